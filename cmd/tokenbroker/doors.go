package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"tokenbroker/broker"
	"tokenbroker/broker/grpcserver"
	"tokenbroker/broker/httpserver"
	"tokenbroker/broker/peersocket"
)

// drainTime is how long requests under way may take when the broker stops.
const drainTime = 10 * time.Second

// doors are the sockets of hubs and administrator, and the servers behind
// these and behind the containers' sockets.
type doors struct {
	log       *slog.Logger
	listeners []interface{ Close() error }
	grpc      []serving[*grpc.Server]
	http      []serving[*http.Server]
	begun     chan struct{} // closed by serve: the broker has started
	ended     chan struct{} // closed by close
}

// A socket speaks two protocols.
type socket interface {
	GRPC() net.Listener
	HTTP() net.Listener
}

// serving is a server and where it accepts.
type serving[S any] struct {
	server S
	on     net.Listener
}

// openDoors opens the sockets. Nobody is answered before serve.
func openDoors(cfg *Config, b *broker.Broker, servers *peersocket.Servers, log *slog.Logger) (_ *doors, err error) {
	d := &doors{log: log, begun: make(chan struct{}), ended: make(chan struct{})}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	d.answer(servers, grpcserver.NewWorkload(b, log), httpserver.NewWorkload(b, log))
	for _, name := range slices.Sorted(maps.Keys(cfg.Hubs)) {
		if err := d.openHub(cfg, name, b, log); err != nil {
			return nil, err
		}
	}
	if err := d.listen(cfg.Logout, func(h httpserver.Hosts) *http.Server { return httpserver.NewLogout(b, h, log) }); err != nil {
		return nil, fmt.Errorf("logout: %w", err)
	}
	if err := d.listen(cfg.Metrics, func(h httpserver.Hosts) *http.Server { return httpserver.NewMetrics(b, h, log) }); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	admin, err := peersocket.ListenAdmin(cfg.Admin.Socket, d.refused(b), log)
	if err != nil {
		return nil, err
	}
	d.listeners = append(d.listeners, admin)
	d.answer(admin, grpcserver.NewAdmin(b, log), noJSON())
	return d, nil
}

// refused puts those who may not use a socket into the audit. There is none before
// the broker has started, so until then they wait.
func (d *doors) refused(b *broker.Broker) peersocket.Refused {
	return func(p *broker.Peer, socket string, why error) {
		select {
		case <-d.begun:
			b.Stranger(p, socket, why)
		case <-d.ended:
		}
	}
}

// answer lets a pair of servers answer behind a socket.
func (d *doors) answer(on socket, g *grpc.Server, h *http.Server) {
	d.grpc = append(d.grpc, serving[*grpc.Server]{g, on.GRPC()})
	d.http = append(d.http, serving[*http.Server]{h, on.HTTP()})
}

// noJSON tells those who come to the administrator's socket with curl.
func noJSON() *http.Server {
	return &http.Server{
		ReadHeaderTimeout: 5 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "this socket speaks gRPC only; use the tokenbroker command", http.StatusNotFound)
		}),
	}
}

func (d *doors) openHub(cfg *Config, name broker.HubID, b *broker.Broker, log *slog.Logger) error {
	h := cfg.Hubs[name]
	l, err := peersocket.ListenHub(h.Socket, name, h.UID, d.refused(b), log)
	if err != nil {
		return err
	}
	d.listeners = append(d.listeners, l)
	d.answer(l, grpcserver.NewHub(b, log), httpserver.NewHub(b, log))
	if err := writeHubFile(cfg, name); err != nil {
		return fmt.Errorf("hubs.%s: %w", name, err)
	}
	if h.Listener == nil {
		return nil
	}
	secret, err := readSecret(h.Listener.ClientSecretFile)
	if err == nil {
		err = d.listen(&h.Listener.ListenConfig, func(hosts httpserver.Hosts) *http.Server {
			return httpserver.NewTokenEndpoint(b, name, secret, hosts, log)
		})
	}
	if err != nil {
		return fmt.Errorf("hubs.%s.listener: %w", name, err)
	}
	return nil
}

// listen has a server answer those who have no socket of ours, if it is configured.
func (d *doors) listen(at *ListenConfig, server func(httpserver.Hosts) *http.Server) error {
	if at == nil {
		return nil
	}
	cert, err := at.certificate()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", at.Address)
	if err != nil {
		return err
	}
	d.listeners = append(d.listeners, l)
	l = httpserver.Bound(l, d.log)
	if cert != nil {
		l = tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*cert}})
	}
	d.http = append(d.http, serving[*http.Server]{server(at.hosts(cert)), l})
	return nil
}

// certificate is what a listener shows, or nil if it speaks no TLS.
func (c *ListenConfig) certificate() (*tls.Certificate, error) {
	if c.TLSCertFile == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(c.TLSCertFile, c.TLSKeyFile)
	return &cert, err
}

// hosts are the names that a listener has with its certificate, if there is one.
func (c *ListenConfig) hosts(cert *tls.Certificate) httpserver.Hosts {
	h := httpserver.Hosts{Further: c.Hosts}
	if cert != nil {
		h.Certificate = cert.Leaf
	}
	return h
}

// A hubFile tells the hub's Python half what it need not be told twice.
type hubFile struct {
	Hub       broker.HubID        `json:"hub"`
	Servers   string              `json:"servers"`
	Providers []broker.ProviderID `json:"providers"`
	Login     broker.ProviderID   `json:"login"`
}

// writeHubFile leaves hub.json beside the hub's socket. There are no secrets
// in it.
func writeHubFile(cfg *Config, name broker.HubID) error {
	text, err := json.Marshal(hubFile{name, cfg.Servers.Directory, slices.Sorted(maps.Keys(cfg.Providers)), cfg.Hubs[name].Login})
	if err != nil {
		return err
	}
	path := filepath.Join(filepath.Dir(cfg.Hubs[name].Socket), "hub.json")
	fresh := path + ".new"
	if err := os.WriteFile(fresh, append(text, '\n'), 0o644); err != nil {
		return err
	}
	if err := os.Chmod(fresh, 0o644); err != nil { // whatever our umask took away
		return err
	}
	return os.Rename(fresh, path)
}

// serve answers on all sockets. The channel gets the error of one that stops
// before drain.
func (d *doors) serve() <-chan error {
	close(d.begun)
	failed := make(chan error, len(d.grpc)+len(d.http))
	for _, s := range d.grpc {
		go func() {
			if err := s.server.Serve(s.on); err != nil {
				failed <- fmt.Errorf("serve gRPC on %s: %w", s.on.Addr(), err)
			}
		}()
	}
	for _, s := range d.http {
		go func() {
			if err := s.server.Serve(s.on); err != nil && !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve HTTP on %s: %w", s.on.Addr(), err)
			}
		}()
	}
	return failed
}

// drain stops accepting and returns when the requests under way are answered,
// or their time is over.
func (d *doors) drain() {
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	var all sync.WaitGroup
	for _, s := range d.grpc {
		all.Go(func() {
			stop := context.AfterFunc(ctx, s.server.Stop)
			defer stop()
			s.server.GracefulStop()
		})
	}
	for _, s := range d.http {
		all.Go(func() {
			if err := s.server.Shutdown(ctx); err != nil {
				d.log.Warn("requests were cut off", "on", s.on.Addr().String(), "err", err)
				s.server.Close()
			}
		})
	}
	all.Wait()
}

// close closes the sockets and removes them.
func (d *doors) close() error {
	close(d.ended)
	var errs []error
	for _, l := range d.listeners {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
