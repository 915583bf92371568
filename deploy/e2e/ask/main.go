// Ask is what a Go program in a notebook server does: it gets a token for an
// audience from the broker, over gRPC, and prints it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"tokenbroker/client"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	token, err := ask(ctx, os.Args[1])
	if err != nil {
		var refused *client.Error
		if errors.As(err, &refused) {
			fmt.Println("code", refused.Code)
		}
		fmt.Fprintln(os.Stderr, "ask: error:", err)
		os.Exit(1)
	}
	fmt.Println(token)
}

func ask(ctx context.Context, audience string) (string, error) {
	c, err := client.New()
	if err != nil {
		return "", err
	}
	defer c.Close()
	token, err := c.TokenSource(ctx, client.Audience(audience)).Token()
	if err != nil {
		return "", err
	}
	return token.AccessToken, nil
}
