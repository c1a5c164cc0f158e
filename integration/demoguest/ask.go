package demoguest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"cloudlet/integration/appguest"
)

// answerBound is how long an application may take to answer, one request or the first of many.
const answerBound = 5 * time.Minute

// FirstAnswer asks until the application answers and checks the answer, against token unless
// that is empty.
func FirstAnswer(ctx context.Context, address string, window int, token string) (appguest.Answer, error) {
	var a appguest.Answer
	if err := Await(ctx, address, fmt.Sprintf("/?window=%d", window), &a); err != nil {
		return a, err
	}
	return a, a.Check(token, window)
}

// Await makes a request until there is an answer to decode into v.
func Await(ctx context.Context, address, path string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, answerBound)
	defer cancel()
	for {
		err := request(ctx, address, path, v)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("no answer: %w", err)
		}
	}
}

// Ask makes one request and decodes its answer into v.
func Ask(ctx context.Context, address, path string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, answerBound)
	defer cancel()
	return request(ctx, address, path, v)
}

// Verify compares all that the application holds with what it must be.
func Verify(ctx context.Context, address, token string) error {
	var v appguest.Verification
	if err := Ask(ctx, address, "/verify", &v); err != nil {
		return err
	}
	return v.Check(token)
}

func request(ctx context.Context, address, path string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return json.Unmarshal(body, v)
}
