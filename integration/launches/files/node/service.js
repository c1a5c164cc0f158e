// The service of the launch VM: customer records as objects on the heap, with indexes over
// them, as a service that caches its database holds them. Its data come from its token.
'use strict';

const crypto = require('node:crypto');
const http = require('node:http');
const { execFile } = require('node:child_process');

const RECORDS = 40000;
const ORDERS = 5; // at most, of a record

const SYLLABLES = ['al', 'be', 'cor', 'da', 'el', 'fin', 'ga', 'hol', 'in', 'jo', 'ka', 'lem', 'mi', 'nor', 'or', 'pe', 'qui', 'ra', 'sen', 'to'];
const CITIES = ['Aachen', 'Bergen', 'Cork', 'Delft', 'Espoo', 'Faro', 'Ghent', 'Haifa', 'Izmir', 'Jena'];
const TAGS = ['new', 'loyal', 'late', 'abroad', 'wholesale', 'trial'];

const token = crypto.randomBytes(16).toString('hex');
let counter = 0;

// below returns whole numbers below n, drawn from the token (mulberry32).
let state = parseInt(token.slice(0, 8), 16);
function below(n) {
  state = (state + 0x6d2b79f5) | 0;
  let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) % n;
}

const pick = (list) => list[below(list.length)];

function word() {
  let text = pick(SYLLABLES);
  for (let n = below(3) + 1; n > 0; n--) text += pick(SYLLABLES);
  return text;
}

function sentence() {
  const words = [];
  for (let n = below(12) + 4; n > 0; n--) words.push(word());
  return words.join(' ');
}

function record(id) {
  const name = `${word()} ${word()}`;
  const orders = [];
  for (let n = below(ORDERS + 1); n > 0; n--) {
    orders.push({ article: below(5000), count: below(9) + 1, cents: below(100000), note: word() });
  }
  return {
    id, name, email: `${name.replace(' ', '.')}.${id}@example.org`, key: (below(1 << 30) * 4 + below(4)).toString(36),
    address: { street: `${word()} ${below(200) + 1}`, city: pick(CITIES), code: String(10000 + below(90000)) },
    tags: TAGS.filter(() => below(3) === 0), created: new Date(1.6e12 + below(1e9) * 100).toISOString(),
    note: sentence(), orders,
  };
}

const byID = new Map();
const byEmail = new Map();
const byCity = new Map();
for (let id = 1; id <= RECORDS; id++) {
  const r = JSON.parse(JSON.stringify(record(id))); // as if it had come from elsewhere
  byID.set(id, r);
  byEmail.set(r.email, r);
  if (!byCity.has(r.address.city)) byCity.set(r.address.city, []);
  byCity.get(r.address.city).push(r);
}

// hash covers all records in full, and every entry of the indexes.
function hash() {
  const h = crypto.createHash('sha256');
  for (const [id, r] of byID) h.update(`${id} ${JSON.stringify(r)}\n`);
  for (const [email, r] of byEmail) h.update(`${email} ${r.id}\n`);
  for (const [city, list] of byCity) h.update(`${city} ${list.map((r) => r.id).join(' ')}\n`);
  return h.digest('hex');
}

function answer(url) {
  if (url.pathname === '/verify') return [200, { token, counter, data: hash() }];
  if (url.pathname !== '/') return [404, { error: 'want /, /?id=N or /verify' }];
  const r = byID.get(Number(url.searchParams.get('id') ?? 1));
  if (r === undefined) return [404, { error: 'there is no such record' }];
  counter++;
  const neighbours = byCity.get(r.address.city).length - 1;
  return [200, { token, counter, record: byEmail.get(r.email), neighbours }];
}

const server = http.createServer((request, response) => {
  const [status, body] = answer(new URL(request.url, 'http://guest'));
  const text = JSON.stringify(body);
  response.writeHead(status, { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(text) });
  response.end(text);
});

// Tells systemd that requests can come.
server.listen(80, () => execFile('systemd-notify', ['--ready'], (err) => {
  if (err) throw err;
}));
