//go:build !release

package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"tokenbroker/client"
)

// A question is what the story asks its notebook to do.
type question struct {
	ID           int
	Via          string // gRPC, JSON, or Watch until there is no token
	Audience     string
	UntilRefused bool // go on asking until the broker says no
}

// An answer is what the notebook tells about it. The token stays where it is.
type answer struct {
	ID        int
	Started   bool // asking goes on; another answer follows
	Via       string
	Claims    map[string]any
	Scopes    []string
	ExpiresIn int64
	Print     string // fingerprint of the token
	Refused   *refusal
	LastToken time.Time // when the last token was asked for
	At        time.Time // when this answer came
}

// A refusal is the broker's no, with the names of its problem+json.
type refusal struct {
	Code     string `json:"code"`
	Sentence string `json:"detail"`
	Next     string `json:"next"`
	Ref      string `json:"ref"`
}

// Error is the code and the sentence.
func (r *refusal) Error() string { return r.Code + ": " + r.Sentence }

// beNotebook answers questions until there are no more.
func beNotebook(ctx context.Context, in io.Reader, out io.Writer) error {
	grpc, err := client.New()
	if err != nil {
		return err
	}
	defer grpc.Close()
	asks := map[string]func(context.Context, question) (answer, error){
		"gRPC": func(ctx context.Context, q question) (answer, error) { return askGRPC(ctx, grpc, q) },
		"JSON": askJSON,
	}
	var (
		mu  sync.Mutex // guards enc
		enc = json.NewEncoder(out)
		all sync.WaitGroup
	)
	tell := func(q question, a answer) {
		mu.Lock()
		defer mu.Unlock()
		a.ID, a.Via = q.ID, q.Via
		enc.Encode(a)
	}
	does := func(q question) {
		if q.Via == "Watch" {
			watch(ctx, grpc, q, func(a answer) { tell(q, a) })
			return
		}
		work(ctx, q, asks[q.Via], func(a answer) { tell(q, a) })
	}
	defer all.Wait()
	for dec := json.NewDecoder(in); ; {
		var q question
		if err := dec.Decode(&q); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		all.Go(func() { does(q) })
	}
}

// patience is how long a notebook goes on that waits for a refusal.
const patience = 30 * time.Second

// watch answers with the first reason why there is no token.
func watch(ctx context.Context, c *client.Client, q question, tell func(answer)) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	started := false
	for _, err := range c.Watch(ctx, client.Audience(q.Audience)) {
		if err != nil {
			tell(answer{Refused: refusalOf(err), At: time.Now()})
			return
		}
		if !started {
			tell(answer{Started: true})
		}
		started = true
	}
	tell(answer{At: time.Now()})
}

func refusalOf(err error) *refusal {
	var e *client.Error
	if errors.As(err, &e) {
		return &refusal{string(e.Code), e.Sentence, e.Next, e.Ref}
	}
	return &refusal{Code: "internal", Sentence: err.Error()}
}

// betweenAsks keeps a notebook that asks in a loop within its server's rate.
const betweenAsks = 5 * time.Millisecond

// work answers one question.
func work(ctx context.Context, q question, ask func(context.Context, question) (answer, error), tell func(answer)) {
	var last time.Time
	for end := time.Now().Add(patience); ; {
		asked := time.Now()
		a, err := ask(ctx, q)
		a.At, a.LastToken = time.Now(), last
		if err != nil && !errors.As(err, &a.Refused) {
			a.Refused = &refusal{Code: "internal", Sentence: err.Error()}
		}
		if !q.UntilRefused || err != nil || a.At.After(end) {
			tell(a)
			return
		}
		if last.IsZero() {
			tell(answer{Started: true})
		}
		// Not when it came: a machine under load delays what has left long ago.
		last = asked
		time.Sleep(betweenAsks)
	}
}

func askGRPC(ctx context.Context, c *client.Client, q question) (answer, error) {
	t, err := c.Token(ctx, client.Audience(q.Audience))
	if err != nil {
		return answer{}, refusalOf(err)
	}
	return answerOf(t.AccessToken, t.Scopes, time.Until(t.ExpiresAt)), nil
}

// askJSON asks as curl would.
func askJSON(ctx context.Context, q question) (answer, error) {
	var t struct {
		AccessToken string   `json:"access_token"`
		Scopes      []string `json:"scopes"`
		ExpiresIn   int64    `json:"expires_in"`
	}
	c := unixClient(os.Getenv(client.SocketVariable))
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/v1/token?audience="+url.QueryEscape(q.Audience), nil)
	if err != nil {
		return answer{}, err
	}
	if _, err := exchange(c, req, &t); err != nil {
		return answer{}, err
	}
	return answerOf(t.AccessToken, t.Scopes, time.Duration(t.ExpiresIn)*time.Second), nil
}

func answerOf(token string, scopes []string, left time.Duration) answer {
	sum := sha256.Sum256([]byte(token))
	return answer{Claims: claimsOf(token), Scopes: scopes, ExpiresIn: int64(left.Round(time.Second) / time.Second), Print: hex.EncodeToString(sum[:])}
}

// claimsOf decodes a JSON Web Token without verifying it.
func claimsOf(token string) map[string]any {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil
	}
	var claims map[string]any
	json.Unmarshal(payload, &claims)
	return claims
}

// unixClient speaks HTTP over a Unix socket.
func unixClient(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
}

// exchange sends a request, reads the JSON that comes back into answer, and
// returns its text.
func exchange(c *http.Client, req *http.Request, answer any) (text []byte, err error) {
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if text, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20)); err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return text, json.Unmarshal(text, answer)
	}
	var r refusal
	if json.Unmarshal(text, &r) != nil || r.Sentence == "" {
		return text, fmt.Errorf("the broker answered %s: %.200s", resp.Status, text)
	}
	return text, &r
}

// A notebook is the child process as the story sees it.
type notebook struct {
	socket string
	cmd    *exec.Cmd
	enc    *json.Encoder
	stdin  io.Closer
	ended  chan struct{}

	mu      sync.Mutex // guards the rest
	next    int
	waiting map[int]chan answer
	said    []byte // all that it ever told, for the search
}

// startNotebook runs this program again, as a notebook with nothing but the
// path of its socket.
func startNotebook(socket string, stderr io.Writer) (*notebook, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "demo", "--notebook")
	cmd.Args[0] = os.Args[0] // a test runs this program under another name
	cmd.Env = []string{client.SocketVariable + "=" + socket}
	cmd.Stderr = stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the notebook: %w", err)
	}
	n := &notebook{socket: socket, cmd: cmd, enc: json.NewEncoder(stdin), stdin: stdin, ended: make(chan struct{}), waiting: map[int]chan answer{}}
	go n.listen(stdout)
	return n, nil
}

func (n *notebook) pid() int { return n.cmd.Process.Pid }

// listen hands answers to those who wait for them.
func (n *notebook) listen(r io.Reader) {
	defer close(n.ended)
	for dec := json.NewDecoder(r); ; {
		var text json.RawMessage
		var a answer
		if dec.Decode(&text) != nil || json.Unmarshal(text, &a) != nil {
			return
		}
		n.mu.Lock()
		n.said = append(n.said, text...)
		to := n.waiting[a.ID]
		n.mu.Unlock()
		to <- a
	}
}

// A reply is an answer that is still to come.
type reply struct {
	n  *notebook
	to chan answer
}

// send asks the notebook something.
func (n *notebook) send(q question) reply {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.next++
	q.ID = n.next
	to := make(chan answer, 2)
	n.waiting[q.ID] = to
	n.enc.Encode(q) // a notebook that has ended is noticed when it doesn't answer
	return reply{n, to}
}

// answer waits for the notebook's answer.
func (r reply) answer() (answer, error) {
	select {
	case a := <-r.to:
		return a, nil
	case <-r.n.ended:
		return answer{}, errors.New("the notebook has ended")
	}
}

// started waits until the notebook has got its first token.
func (r reply) started() error {
	a, err := r.answer()
	if err == nil && a.Refused != nil {
		return a.Refused
	}
	return err
}

// close ends the notebook.
func (n *notebook) close() error {
	n.stdin.Close()
	<-n.ended
	return n.cmd.Wait()
}
