package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"

	"golang.org/x/oauth2"

	"tokenbroker/client"
)

func Example() {
	ctx := context.Background()
	c, err := client.New()
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	tok, err := c.Token(ctx, client.Audience("storage"))
	if errors.Is(err, client.ErrLoginRequired) {
		fmt.Println("please log in to the hub again; this program can go on then")
	}
	if err != nil {
		log.Fatal(err) // a sentence and what to do
	}
	fmt.Println("until", tok.ExpiresAt)
}

func ExampleClient_Watch() {
	ctx := context.Background()
	c, err := client.New()
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	for tok, err := range c.Watch(ctx, client.Audience("storage")) {
		switch {
		case errors.Is(err, client.ErrRoleLost), errors.Is(err, client.ErrRevoked):
			fmt.Println("no more uploads:", err)
		case err != nil:
			fmt.Println("uploads wait:", err) // a login, or the provider
		default:
			fmt.Println("uploads go on, with a token until", tok.ExpiresAt)
		}
	}
}

func ExampleClient_TokenSource() {
	ctx := context.Background()
	c, err := client.New()
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	// Each request carries a token that is good now. Wait lets a long job outlast
	// a restart of the broker.
	source := c.TokenSource(ctx, client.Audience("storage"), client.Wait(0))
	web := &http.Client{Transport: &oauth2.Transport{Source: source}}
	resp, err := web.Get("https://storage.example.org/")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
}
