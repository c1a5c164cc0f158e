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

// FirstAnswer asks until the application answers and checks the answer, against token unless
// that is empty.
func FirstAnswer(ctx context.Context, address string, window int, token string) (appguest.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for {
		var a appguest.Answer
		err := request(ctx, address, fmt.Sprintf("/?window=%d", window), &a)
		if err == nil {
			return a, a.Check(token, window)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return a, fmt.Errorf("no answer: %w", err)
		}
	}
}

// Verify compares all that the application holds with what it must be.
func Verify(ctx context.Context, address, token string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var v appguest.Verification
	if err := request(ctx, address, "/verify", &v); err != nil {
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
