package service

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"
)

// A message is answered at once, but for prepare: a destination may have to fetch first. One
// without an answer is sent again: on a link that was cut TCP may wait for long.
const (
	answerWait  = 10 * time.Second
	prepareWait = 60 * time.Second
)

// handoffPeer carries messages to the other cloudlet over its API.
type handoffPeer struct {
	client *http.Client
	allow  *allowList
	to     string
	token  string
}

func newHandoffPeer(m handoffMeta) (*handoffPeer, error) {
	allow, err := newAllowList(m.Allow)
	if err != nil {
		return nil, err
	}
	dial := (&net.Dialer{}).DialContext
	if allow != nil {
		dial = allow.connect
	}
	return &handoffPeer{client: newFetcher(forgetful(dial)), allow: allow, to: m.To, token: m.Token}, nil
}

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// forgetful returns a dialer of connections that, closed, send nothing any more: a message that
// was given up on a link that is down, such as go, is not to arrive once the link is back.
func forgetful(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		if tcp, ok := c.(*net.TCPConn); ok {
			if err := tcp.SetLinger(0); err != nil {
				return nil, errors.Join(err, c.Close())
			}
		}
		return c, nil
	}
}

// newFetcher returns a client that follows no redirects and dials by dial, or if that is nil
// anything.
func newFetcher(dial dialFunc) *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy, t.DisableCompression, t.MaxIdleConnsPerHost = nil, true, 2
	t.ResponseHeaderTimeout = prepareWait
	if dial != nil {
		t.DialContext = dial
	}
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// Send implements handoff.Peer. Only an answer with the status 200 is one of the protocol.
func (p *handoffPeer) Send(ctx context.Context, m handoff.Message) (a handoff.Answer, err error) {
	bound := answerWait
	if m.Kind == handoff.KindPrepare {
		bound = prepareWait
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	content, err := json.Marshal(m)
	if err != nil {
		return a, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.to+"/v1/handoffs", bytes.NewReader(content))
	if err != nil {
		return a, err
	}
	if p.allow != nil {
		if err := p.allow.check(req.URL); err != nil {
			return a, fmt.Errorf("%w: %w", handoff.ErrForGood, err)
		}
	}
	req.Header.Set("Content-Type", "application/json")
	if p.token != "" {
		req.Header.Set("Authorization", "Bearer "+p.token)
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, handoff.MaxMessage+1))
	if err != nil {
		return a, err
	}
	if resp.StatusCode == http.StatusOK {
		if a, err = handoff.ParseAnswer(body); err != nil {
			err = fmt.Errorf("%w: %s is no cloudlet that can be understood: %w", handoff.ErrForGood, p.to, err)
		}
		return a, err
	}
	err = fmt.Errorf("%s answered %s%s", p.to, resp.Status, problemText(resp, body))
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed:
		err = fmt.Errorf("%w: %w", handoff.ErrForGood, err)
	}
	return a, err
}

// problemText returns what a problem document says.
func problemText(resp *http.Response, body []byte) string {
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	var e api.Error
	if kind != "application/problem+json" || json.Unmarshal(body, &e) != nil || e.Detail == "" {
		return ""
	}
	return ": " + e.Error()
}
