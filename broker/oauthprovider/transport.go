package oauthprovider

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"tokenbroker/broker"
)

// maxBody is the most that is read of any answer.
const maxBody = 1 << 20

// Transport is how a provider is reached: it trusts the authorities in a file, or
// the system's, goes by a proxy if there is one, whatever the environment says, and
// repeats no request.
func Transport(caFile, proxy string) (*http.Transport, error) {
	t := &http.Transport{
		DialContext:            (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    10 * time.Second,
		MaxIdleConnsPerHost:    8,
		IdleConnTimeout:        60 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true,
		// HTTP/2 repeats a request by itself when its stream was refused.
		TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{},
	}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca_file: %s holds no PEM certificate", caFile)
		}
		t.TLSClientConfig.RootCAs = pool
	}
	if proxy != "" {
		u, err := url.Parse(proxy)
		if err != nil || u.Host == "" {
			return nil, errors.New("proxy: it is not a URL") // it may hold a password: not shown
		}
		t.Proxy = http.ProxyURL(u)
	}
	return t, nil
}

// clients are one for POSTs and one for GETs. Neither follows redirects: a
// token must not go anywhere but where the configuration says.
//
// POSTs use a new connection each. On a kept one nobody can tell whether the
// server had closed it before or after it read the token.
func clients(base *http.Transport, timeout time.Duration) (once, look *http.Client) {
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	once = &http.Client{Transport: newFresh(base), CheckRedirect: stay}
	look = &http.Client{Transport: bounded{base}, CheckRedirect: stay, Timeout: timeout}
	return once, look
}

// fresh makes a connection for each request, in the goroutine that asks: so
// [broker.Erasing] covers its buffers, which hold what is sent and answered. A
// Transport makes its own connections elsewhere.
type fresh struct{ *http.Transport }

func newFresh(base *http.Transport) fresh {
	t := base.Clone()
	t.DisableKeepAlives = true
	t.WriteBufferSize = 32 << 10 // what is longer goes through other buffers
	t.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		// The timeout is that of the connection and the handshake together.
		d := tls.Dialer{NetDialer: &net.Dialer{Timeout: t.TLSHandshakeTimeout}, Config: t.TLSClientConfig}
		conn, err := d.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return erasing{conn}, nil
	}
	return fresh{t}
}

func (f fresh) RoundTrip(req *http.Request) (*http.Response, error) {
	conn, err := f.NewClientConn(req.Context(), req.URL.Scheme, net.JoinHostPort(req.URL.Hostname(), req.URL.Port()))
	if err != nil {
		req.Body.Close()
		return nil, err
	}
	resp, err := conn.RoundTrip(req) // closes req.Body
	if err != nil {
		conn.Close()
	}
	return resp, err
}

// erasing is a TLS connection whose buffers are erased: what is sent and answered
// passes through them in the clear, in goroutines of net/http's.
type erasing struct{ net.Conn }

func (c erasing) Read(p []byte) (n int, err error) {
	broker.Erasing(func() { n, err = c.Conn.Read(p) })
	return n, err
}

func (c erasing) Write(p []byte) (n int, err error) {
	broker.Erasing(func() { n, err = c.Conn.Write(p) })
	return n, err
}

// bounded ends every body after maxBody, for go-oidc, which reads all of it.
type bounded struct{ next http.RoundTripper }

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxBody), resp.Body}
	return resp, nil
}

var (
	errUnreadable = errors.New("what came back can't be read")
	errTooLarge   = errors.New("the answer is larger than 1 MiB")
	errCutOff     = errors.New("the connection ended within the answer")
)

// plain is err without what the provider sent: net/http quotes a malformed
// answer, and a URL can hold what nobody should read.
func plain(err error) error {
	var (
		op     *net.OpError
		dns    *net.DNSError
		cert   *tls.CertificateVerificationError
		record tls.RecordHeaderError
		alert  tls.AlertError
	)
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return context.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case errors.As(err, &cert):
		return cert
	case errors.As(err, &op):
		return op
	case errors.As(err, &dns):
		return dns
	case errors.As(err, &record):
		return record
	case errors.As(err, &alert):
		return alert
	case errors.Is(err, http.ErrSchemeMismatch):
		return http.ErrSchemeMismatch
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return io.ErrUnexpectedEOF
	}
	return errUnreadable
}

// unreached is the error of a request that did not get through. sent says that
// the provider may have read all of it.
func unreached(o op, sent bool, err error) *broker.ProviderError {
	e := &broker.ProviderError{Class: broker.TryLater, Reason: "unreachable", Err: plain(err)}
	var cert *tls.CertificateVerificationError
	switch {
	case errors.As(err, &cert):
		e.Class, e.Reason = broker.Misconfigured, "certificate_untrusted"
	case sent && o.spends():
		e.Class, e.Reason = broker.Lost, "no_answer"
	case sent:
		e.Reason = "no_answer"
	}
	return e
}
