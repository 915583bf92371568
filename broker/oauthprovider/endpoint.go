package oauthprovider

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"tokenbroker/broker"
)

// An op is what a request is for. The same answer means something else for a
// grant when it was only a narrower token that was asked for.
type op uint8

const (
	opCode op = 1 << iota
	opRefresh
	opExchange
	opRevoke
	opIntrospect
	opLook // discovery and the like
)

// spends reports whether the request uses up what it carries, so that not
// knowing whether it arrived matters.
func (o op) spends() bool { return o&(opCode|opRefresh) != 0 }

// A reply is an answer as it came.
type reply struct {
	status int
	header http.Header
	body   []byte
}

// ask sends one token request of who and reads the answer.
func (p *Provider) ask(ctx context.Context, m *metadata, o op, who string, form url.Values) (a *answer, err error) {
	err = p.post(ctx, m, o, m.Token, who, form, func(r *reply) bool {
		a = parseAnswer(r.body)
		return a != nil
	})
	return a, err
}

// post sends form when its turn comes, once. What came back is read by read if
// its status is favourable; if read can't make anything of it, it is a refusal.
func (p *Provider) post(ctx context.Context, m *metadata, o op, endpoint, who string, form url.Values, read func(*reply) bool) error {
	return p.gate.pass(ctx, o, who, func() (err error) {
		broker.Erasing(func() {
			var r *reply
			if r, err = p.send(ctx, m, o, endpoint, form); err == nil && (r.status/100 != 2 || !read(r)) {
				err = p.profile.refusal(o, r)
			}
		})
		return err
	})
}

// send sends form exactly once.
func (p *Provider) send(ctx context.Context, m *metadata, o op, endpoint string, form url.Values) (*reply, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, nil)
	if err != nil {
		return nil, &broker.ProviderError{Class: broker.Misconfigured, Reason: "bad_url"}
	}
	if err := p.authenticate(req, m, form); err != nil {
		return nil, err
	}
	body := form.Encode()
	req.Body = io.NopCloser(strings.NewReader(body))
	req.ContentLength = int64(len(body))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")

	// net/http calls WroteRequest before it flushes the last bytes: if it was
	// not called, the provider can't have read the whole request.
	var sent atomic.Bool
	req = req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(i httptrace.WroteRequestInfo) { sent.Store(i.Err == nil) },
	}))
	resp, err := p.once.Do(req)
	if err != nil {
		return nil, unreached(o, sent.Load(), err)
	}
	defer resp.Body.Close()
	read, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err == nil && len(read) > maxBody {
		err = errTooLarge
	}
	if err != nil {
		return nil, unread(o, resp.StatusCode, err)
	}
	return &reply{resp.StatusCode, resp.Header, read}, nil
}

// unread is the error of an answer whose body can't be had. What its status
// alone says still counts.
func unread(o op, status int, err error) *broker.ProviderError {
	class, _ := byStatus(o, status, false)
	switch cause := plain(err); {
	case err == errTooLarge:
	case cause == context.DeadlineExceeded, cause == context.Canceled:
		err = cause
	default:
		err = errCutOff
	}
	return &broker.ProviderError{Class: class, Reason: "unreadable_answer", Status: status, Err: err}
}

// authenticate adds who we are, in one way, decided before anything is sent.
func (p *Provider) authenticate(req *http.Request, m *metadata, form url.Values) error {
	id, secret := p.cfg.ClientID, p.cfg.ClientSecret.Reveal()
	switch p.style(m) {
	case "client_secret_basic":
		// RFC 6749, section 2.3.1: form-encoded first, so that ":" and "%" survive.
		req.SetBasicAuth(url.QueryEscape(id), url.QueryEscape(secret))
	case "client_secret_post":
		form.Set("client_id", id)
		form.Set("client_secret", secret)
	case "private_key_jwt":
		assertion, err := p.signer.assertion(id, audience(m))
		if err != nil {
			return &broker.ProviderError{Class: broker.Misconfigured, Reason: "private_key", Err: errors.New("sign the client assertion")}
		}
		form.Set("client_id", id)
		form.Set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
		form.Set("client_assertion", assertion)
	default:
		form.Set("client_id", id)
	}
	return nil
}

// style is the configured way to authenticate, or the first that both sides
// know.
func (p *Provider) style(m *metadata) string {
	if p.cfg.AuthStyle != "" {
		return p.cfg.AuthStyle
	}
	offered := func(s string) bool { return slices.Contains(m.AuthStyles, s) }
	switch {
	case p.signer != nil:
		return "private_key_jwt"
	case p.cfg.ClientSecret.IsZero():
		return "none"
	case !offered("client_secret_basic") && offered("client_secret_post"):
		return "client_secret_post"
	}
	return "client_secret_basic"
}

// audience names the provider in a client assertion: by its issuer, which
// can't be another server's token endpoint.
func audience(m *metadata) string {
	if m.Issuer != "" {
		return m.Issuer
	}
	return m.Token
}

// An assertionSigner makes client assertions (RFC 7523).
type assertionSigner struct{ jose jose.Signer }

// assertionLife is short: an assertion is used at once, and only once.
const assertionLife = time.Minute

func (s *assertionSigner) assertion(client, audience string) (string, error) {
	now := time.Now()
	return jwt.Signed(s.jose).Claims(jwt.Claims{
		Issuer: client, Subject: client, Audience: jwt.Audience{audience}, ID: rand.Text(),
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(assertionLife)),
	}).Serialize()
}

// readSigner reads a private key, PEM or JWK.
func readSigner(file string) (*assertionSigner, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("private_key_file: %w", err)
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("private_key_file: %s holds no private key, neither PEM nor JWK", file)
	}
	alg, err := algorithm(key.Key)
	if err != nil {
		return nil, fmt.Errorf("private_key_file: %w", err)
	}
	if key.Algorithm != "" {
		alg = jose.SignatureAlgorithm(key.Algorithm)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, errors.New("private_key_file: the key can't sign with " + string(alg))
	}
	return &assertionSigner{signer}, nil
}

func parseKey(data []byte) (jose.JSONWebKey, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		var k jose.JSONWebKey
		err := json.Unmarshal(data, &k)
		return k, err
	}
	if k, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
		return jose.JSONWebKey{Key: k}, nil
	}
	if k, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return jose.JSONWebKey{Key: k}, nil
	}
	k, err := x509.ParseECPrivateKey(block.Bytes)
	return jose.JSONWebKey{Key: k}, err
}

func algorithm(key crypto.PrivateKey) (jose.SignatureAlgorithm, error) {
	switch k := key.(type) {
	case *rsa.PrivateKey:
		return jose.RS256, nil
	case ed25519.PrivateKey:
		return jose.EdDSA, nil
	case *ecdsa.PrivateKey:
		switch k.Curve.Params().BitSize {
		case 256:
			return jose.ES256, nil
		case 384:
			return jose.ES384, nil
		case 521:
			return jose.ES512, nil
		}
	}
	return "", errors.New("it holds neither an RSA, an ECDSA nor an Ed25519 private key")
}

// retryAfter reads the header of that name; 0 if there is none.
func retryAfter(h http.Header) time.Duration {
	v := h.Get("Retry-After")
	d := time.Duration(0)
	if n, err := strconv.Atoi(v); err == nil && n > 0 {
		d = time.Duration(min(n, int(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(v); err == nil {
		d = time.Until(at).Round(time.Second)
	}
	return min(max(d, 0), maxRetryAfter)
}

// maxRetryAfter keeps a wrong date from switching a provider off for years.
const maxRetryAfter = time.Hour
