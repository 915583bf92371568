package httpserver_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/httpserver"
)

// named is for listeners that are asked as broker.example.
var named = httpserver.Hosts{Further: []string{"broker.example"}}

const tcpSecret = "0123456789abcdefghijklmnopqrstuvwxyz0123456"

// listen has a server answer at a TCP listener until the test ends; with cert it
// speaks TLS.
func (s *stack) listen(srv *http.Server, cert *tls.Certificate) (address string) {
	s.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(s.t, err)
	address = l.Addr().String()
	l = httpserver.Bound(l, slog.New(slog.NewTextHandler(s.log, nil)))
	if cert != nil {
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{*cert}})
	}
	var served sync.WaitGroup
	served.Go(func() { srv.Serve(l) })
	s.t.Cleanup(func() {
		srv.Close()
		served.Wait()
	})
	return address
}

// tokenEndpoint is a hub's, on a TCP listener.
func (s *stack) tokenEndpoint(h httpserver.Hosts, cert *tls.Certificate) (address string) {
	return s.listen(httpserver.NewTokenEndpoint(s.b, "main", broker.NewSecret(tcpSecret), h, slog.New(slog.NewTextHandler(s.log, nil))), cert)
}

// certificate is for broker.example, all of lab.example and 192.0.2.7.
func certificate(t *testing.T) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"Broker.example", "*.lab.example"}, IPAddresses: []net.IP{netip.MustParseAddr("192.0.2.7").AsSlice()},
	}, &x509.Certificate{}, key.Public(), key)
	check(t, err)
	leaf, err := x509.ParseCertificate(der)
	check(t, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// A link is a connection of a client that speaks for itself.
type link struct {
	net.Conn
	in *bufio.Reader
}

func newLink(c net.Conn) link { return link{c, bufio.NewReader(c)} }

func dialTCP(t testing.TB, address string) link {
	t.Helper()
	c, err := net.Dial("tcp", address)
	check(t, err)
	t.Cleanup(func() { c.Close() })
	return newLink(c)
}

// refresh asks for a token with a secret and returns the answer.
func (l link) refresh(secret, handle, host string) (status int, text string, err error) {
	body := with(refreshForm(handle), "client_secret", secret).Encode()
	return l.say(fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", endpoint, host, form, len(body), body))
}

func (l link) say(request string) (status int, text string, err error) {
	l.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(l, request); err != nil {
		return 0, "", err
	}
	resp, err := http.ReadResponse(l.in, nil)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(all), err
}

// ended waits until the other side has ended the connection.
func (l link) ended() bool {
	l.SetReadDeadline(time.Now().Add(time.Minute))
	_, err := l.in.ReadByte()
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// A listener without TLS is on the loopback interface; with it, it has the names of
// its certificate. Only a proxy before it needs names to be configured.
func TestAListenerAnswersUnderItsNamesOnly(t *testing.T) {
	cert := certificate(t)
	for _, tt := range []struct {
		why   string
		cert  *tls.Certificate
		hosts httpserver.Hosts
		right []string
		wrong []string
	}{
		{
			"loopback", nil, httpserver.Hosts{},
			[]string{"localhost", "LocalHost:9444", "localhost.", "127.0.0.1", "127.0.0.1:9444", "127.8.9.10", "[::1]", "[::1]:9444"},
			[]string{"", ":9444", ".", "evil.example", "localhost.evil.example", "evil.localhost", "[::1%evil.example]", "10.0.0.1", "[::2]", "0.0.0.0", "127.0.0.1.evil.example"},
		},
		{
			"TLS", cert, httpserver.Hosts{Certificate: cert.Leaf},
			[]string{"broker.example", "BROKER.example.:9444", "a.lab.example:9444", "192.0.2.7", "192.0.2.7:9444"},
			[]string{"", ".", "localhost", "127.0.0.1", "evil.example", "lab.example", "a.b.lab.example", "*.lab.example.evil", "192.0.2.8"},
		},
		{
			"behind a proxy", nil, httpserver.Hosts{Further: []string{"Hub.example", "192.0.2.7", "2001:db8::1"}},
			[]string{"hub.example", "HUB.example.:443", "192.0.2.7", "[2001:db8::1]:443", "localhost", "127.0.0.1"},
			[]string{"", "a.hub.example", "example", "hub.example.evil", "192.0.2.70"},
		},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, setup{})
			handle := s.login().Reveal()
			address := s.tokenEndpoint(tt.hosts, tt.cert)
			ask := func(host string) (int, string) {
				l := dialTCP(t, address)
				if tt.cert != nil {
					l = newLink(tls.Client(l.Conn, &tls.Config{InsecureSkipVerify: true}))
				}
				status, text, err := l.refresh(tcpSecret, handle, host)
				check(t, err)
				return status, text
			}
			for _, host := range tt.right {
				if status, text := ask(host); status != 200 || !strings.Contains(text, "access_token") {
					t.Errorf("Host %q: %d %s", host, status, text)
				}
			}
			for _, host := range tt.wrong {
				if status, text := ask(host); status != 400 || !strings.Contains(text, "hosts in the broker's configuration") || strings.Contains(text, "access_token") {
					t.Errorf("Host %q: %d %s", host, status, text)
				}
			}
		})
	}
}

// What else listens on TCP asks for the host as well, and who says none is nobody's.
func TestEachListenerAsksForTheHostFirst(t *testing.T) {
	s := newStack(t, setup{})
	s.login()
	log := quietLog()
	token := logoutForm("1").Encode()
	endpoint10 := fmt.Sprintf("POST %s HTTP/1.0\r\nContent-Type: %s\r\nContent-Length: 9\r\n\r\nnot=read!", endpoint, form)
	for _, tt := range []struct {
		why, address, request, action string
	}{
		{"the token endpoint, HTTP/1.0", s.tokenEndpoint(httpserver.Hosts{}, nil), endpoint10, "grant"},
		{"the token endpoint, another path", s.tokenEndpoint(httpserver.Hosts{}, nil), "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "request"},
		{
			"logout tokens", s.listen(httpserver.NewLogout(s.b, httpserver.Hosts{}, log), nil),
			fmt.Sprintf("POST %s HTTP/1.1\r\nHost: evil.example\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", logoutPath, form, len(token), token), "provider_logout",
		},
		{"metrics", s.listen(httpserver.NewMetrics(s.b, httpserver.Hosts{}, log), nil), "GET /metrics HTTP/1.1\r\nHost: evil.example:9464\r\n\r\n", "metrics"},
		{"metrics, an Origin", s.listen(httpserver.NewMetrics(s.b, httpserver.Hosts{}, log), nil), "GET /metrics HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\n\r\n", "metrics"},
	} {
		l := dialTCP(t, tt.address)
		status, text, err := l.say(tt.request)
		if err != nil || status != 400 || !strings.Contains(text, "Host") && !strings.Contains(text, "Origin") {
			t.Errorf("%s: %d %s, %v", tt.why, status, text, err)
		}
		if e := s.audit.last(t); e.Outcome != "refused" || e.Action != tt.action || !strings.Contains(e.Reason, "from "+l.LocalAddr().String()) {
			t.Errorf("%s: the audit says %+v", tt.why, e)
		}
	}
	if strings.Contains(s.audit.String(), `"action":"provider_logout","outcome":"done"`) {
		t.Error("the logout token was used")
	}
}

// Whoever can come to the listener has a thousand wrong secrets and holds more
// connections than it takes: silent ones, half requests, answered ones. The hub gets
// its answers meanwhile.
func TestNobodyLocksTheHubOutWithWrongSecrets(t *testing.T) {
	for with, wrong := range map[string]int{"plain": 1000, "TLS": 200} {
		t.Run(with, func(t *testing.T) {
			began := time.Now()
			s := newStack(t, setup{})
			handle := s.login().Reveal()
			hosts, host, dial := httpserver.Hosts{}, "localhost", func(address string) (net.Conn, error) { return net.Dial("tcp", address) }
			var cert *tls.Certificate
			if with == "TLS" {
				cert = certificate(t)
				hosts.Certificate, host = cert.Leaf, "broker.example"
				dial = func(address string) (net.Conn, error) {
					return tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
				}
			}
			address := s.tokenEndpoint(hosts, cert)
			kept, err := dial(address) // and shows the secret before anybody is there
			check(t, err)
			defer kept.Close()
			asked := newLink(kept)
			if status, text, err := asked.refresh(tcpSecret, handle, host); err != nil || status != 200 {
				t.Fatalf("before: %d %s, %v", status, text, err)
			}
			for range 2 * httpserver.MaxConns { // as many again as there is room for, from those who never speak
				dialTCP(t, address)
			}

			const askers = 8
			var storm sync.WaitGroup
			refused := make(chan int, wrong)
			for i := range askers {
				storm.Go(func() {
					for n := range wrong / askers {
						c, err := dial(address)
						if err != nil {
							continue // had to make room
						}
						t.Cleanup(func() { c.Close() })
						l := newLink(c)
						if n%2 == 1 {
							io.WriteString(l, "POST "+endpoint+" HTTP/1.1\r\nHost: "+host+"\r\nContent-Type: "+form+"\r\nContent-Length: 100\r\n\r\nhalf=")
							continue
						}
						if status, _, err := l.refresh(fmt.Sprintf("%s%d-%d", canary, i, n), handle, host); err == nil {
							refused <- status
						}
					}
				})
			}
			for i := range 50 {
				if status, text, err := asked.refresh(tcpSecret, handle, host); err != nil || status != 200 {
					t.Fatalf("over the connection that showed it, time %d: %d %s, %v", i, status, text, err)
				}
				c, err := dial(address)
				check(t, err)
				if status, text, err := newLink(c).refresh(tcpSecret, handle, host); err != nil || status != 200 {
					t.Fatalf("over a new connection, time %d: %d %s, %v", i, status, text, err)
				}
				c.Close()
			}
			storm.Wait()
			close(refused)
			for status := range refused {
				if status != 401 {
					t.Errorf("a wrong secret: %d", status)
				}
			}
			if status, _, err := asked.refresh(tcpSecret, handle, host); err != nil || status != 200 {
				t.Errorf("after the storm: %d, %v", status, err)
			}
			minutes := 1 + int(time.Since(began)/time.Minute) // a slow machine takes several
			if n := strings.Count(s.audit.String(), `"code":"unknown_peer"`); n < 1 || n > 2*minutes {
				t.Errorf("the audit has %d lines of wrong secrets, want the first of a minute, and how many more there were", n)
			}
			if n := strings.Count(s.log.String(), "make room"); n < 1 || n > minutes {
				t.Errorf("the log says %d times that there is no room", n)
			}
			if strings.Contains(s.audit.String()+s.log.String(), canary) {
				t.Error("a secret was written down")
			}
		})
	}
}

// Connections beyond the bound are ended: those which wait longest, of the address
// that has most.
func TestWhoHasMostConnectionsMakesRoom(t *testing.T) {
	s := newStack(t, setup{})
	address := s.tokenEndpoint(httpserver.Hosts{}, nil)
	wrong := func(l link) {
		t.Helper()
		if status, text, err := l.refresh("wrong", "tbh_x", "localhost"); err != nil || status != 401 {
			t.Fatalf("a wrong secret: %d %s, %v", status, text, err)
		}
	}
	from := func(ip string) link {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		c, err := d.Dial("tcp", address)
		if err != nil {
			t.Skipf("this system has no %s: %v", ip, err)
		}
		t.Cleanup(func() { c.Close() })
		l := newLink(c)
		wrong(l) // who says nothing has only 5 s
		return l
	}
	patient := from("127.0.0.2") // the oldest of all
	var flood []link
	for range httpserver.MaxConns + 50 {
		flood = append(flood, from("127.0.0.3"))
	}
	for i, l := range flood[:51] {
		if !l.ended() {
			t.Fatalf("connection %d of the flood is still open", i)
		}
	}
	for _, l := range append(flood[51:], patient) {
		wrong(l)
	}
}

// With everybody there having shown the secret, who comes in addition is turned away.
func TestWhoHasShownTheSecretIsNotEnded(t *testing.T) {
	s := newStack(t, setup{})
	handle := s.login().Reveal()
	address := s.tokenEndpoint(httpserver.Hosts{}, nil)
	var all []link
	for i := range httpserver.MaxConns {
		all = append(all, dialTCP(t, address))
		if status, text, err := all[i].refresh(tcpSecret, handle, "localhost"); err != nil || status != 200 {
			t.Fatalf("connection %d: %d %s, %v", i, status, text, err)
		}
	}
	if c, err := net.Dial("tcp", address); err == nil { // it may be ended sooner than we know that it was made
		if status, text, err := newLink(c).refresh(tcpSecret, handle, "localhost"); err == nil {
			t.Errorf("one too many was answered: %d %s", status, text)
		}
		c.Close()
	}
	for i, l := range all {
		if status, text, err := l.refresh(tcpSecret, handle, "localhost"); err != nil || status != 200 {
			t.Fatalf("connection %d, again: %d %s, %v", i, status, text, err)
		}
	}
	all[0].Close()
	for end := time.Now().Add(time.Minute); ; { // until the server has seen it
		c, err := net.Dial("tcp", address)
		if err == nil {
			_, _, err = newLink(c).refresh(tcpSecret, handle, "localhost")
			c.Close()
		}
		if err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatalf("there is room again: %v", err)
		}
	}
}

func TestATCPListenerDoesNotSpeakHTTP2(t *testing.T) {
	s := newStack(t, setup{})
	l := dialTCP(t, s.tokenEndpoint(named, nil))
	_, err := io.WriteString(l, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	check(t, err)
	first, _ := io.ReadAll(io.LimitReader(l, 12))
	if !strings.HasPrefix(string(first), "HTTP/1.1 ") {
		t.Errorf("the preface of HTTP/2 got %q", first)
	}
}
