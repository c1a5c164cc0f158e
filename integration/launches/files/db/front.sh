#!/bin/bash
# Answers one HTTP request on stdin and stdout from the database, over a connection of its
# own, as any client of a database would.
set -o pipefail
cd "${0%/*}" || exit

query() { psql -X -q -A -t -F ' ' -v ON_ERROR_STOP=1 "$@" bench; }

reply() { # reply STATUS JSON
	printf 'HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s' "$1" "${#2}" "$2"
	exit
}

failed() { reply '500 Internal Server Error' '{"error":"the database does not answer"}'; }

read -r method target _ || exit
while read -r header && [ "${header%$'\r'}" ]; do :; done
[ "$method" = GET ] || reply '405 Method Not Allowed' '{"error":"want GET"}'

case $target in
/verify)
	data=$(query -f verify.sql | sha256sum) || failed
	launch=$(query -c 'select token, counter from launch') || failed
	read -r token counter <<<"$launch"
	reply '200 OK' "{\"token\":\"$token\",\"counter\":$counter,\"data\":\"${data%% *}\"}"
	;;
/) account=1 ;;
'/?account='*) account=${target#*=} ;;
*) reply '404 Not Found' '{"error":"want /, /?account=N or /verify"}' ;;
esac
[[ $account =~ ^[0-9]{1,9}$ ]] || reply '400 Bad Request' '{"error":"account: want a number"}'
answer=$(query -v "account=$account" -f answer.sql) || failed
[ "$answer" ] || reply '404 Not Found' '{"error":"there is no such account"}'
reply '200 OK' "$answer"
