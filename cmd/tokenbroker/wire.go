package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
	"tokenbroker/broker/peersocket"
	"tokenbroker/broker/redisstore"
	"tokenbroker/broker/rolewatch"
	"tokenbroker/broker/seal"
	"tokenbroker/spawnerhook"
)

// parts are what a broker stands on. Opening them asks nobody anything, so
// that a broker starts whatever is down beside it; Check is for that.
type parts struct {
	sockets   *peersocket.Servers
	store     *redisstore.Store
	keys      *seal.Keyset
	attestor  attestor
	providers []broker.Provider
	audit     *broker.AuditFile
}

// An attestor may hold files of the kernel.
type attestor interface {
	broker.Attestor
	io.Closer
}

// open opens the parts that cfg describes. stdout is where an audit without a
// file goes.
func open(cfg *Config, stdout io.Writer, log *slog.Logger) (_ *parts, err error) {
	p := &parts{}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	// First, since it keeps a second broker from touching anything.
	if p.sockets, err = peersocket.NewServers(cfg.Servers.Directory, log); err != nil {
		return nil, err
	}
	p.sockets.SetRate(cfg.Servers.Rate)
	if p.attestor, err = openAttestor(cfg, p.sockets.Directory, log); err != nil {
		return nil, err
	}
	if p.keys, err = seal.Load(cfg.Keys.Keyset, cfg.Keys.KEKFile); err != nil {
		return nil, err
	}
	if p.audit, err = broker.OpenAudit(cfg.auditFile(), stdout, cfg.auditHead(), p.keys.AuditMAC(), log); err != nil {
		return nil, err
	}
	if p.store, err = openStore(cfg); err != nil {
		return nil, err
	}
	p.providers, err = openProviders(cfg, log)
	return p, err
}

// close closes what is open, in the order in which it may be needed.
func (p *parts) close() error {
	var errs []error
	if p.sockets != nil {
		errs = append(errs, p.sockets.Shutdown())
	}
	if p.attestor != nil {
		errs = append(errs, p.attestor.Close())
	}
	if p.store != nil {
		errs = append(errs, p.store.Close())
	}
	if p.audit != nil {
		errs = append(errs, p.audit.Close())
	}
	return errors.Join(errs...)
}

// broker joins the parts.
func (p *parts) broker(cfg *Config, log *slog.Logger) (*broker.Broker, error) {
	hubs := map[broker.HubID]broker.Hub{}
	for name, h := range cfg.Hubs {
		api, err := openHubAPI(h.API)
		if err != nil {
			return nil, fmt.Errorf("hub %s: %w", name, err)
		}
		hubs[name] = broker.Hub{Login: h.Login, Scopes: h.Scopes, OnLogout: h.OnLogout, API: api}
	}
	return broker.New(broker.Config{
		Deployment: cfg.Deployment, Host: broker.HostID(cfg.Host), Contact: cfg.Contact, Version: versionText(),
		Hubs: hubs, Providers: p.providers, Rules: rules(cfg.Policy),
		Store: p.store, Keys: p.keys, Attestor: p.attestor, Sockets: p.sockets,
		Audit: p.audit, AuditHead: p.audit.Head(), Log: log, Helper: cfg.Helper, Journal: cfg.Journal,
		Mounts: mounts(p.attestor, cfg.Servers.Directory),
	})
}

// mounts looks for the containers that mount something in servers; nil without Docker.
func mounts(a attestor, servers string) func(context.Context) ([]broker.Mount, error) {
	d, ok := a.(*spawnerhook.Docker)
	if !ok {
		return nil
	}
	return func(ctx context.Context) ([]broker.Mount, error) { return d.Mounts(ctx, servers) }
}

// openHubAPI makes what the broker asks of a hub; nil if it is not asked.
func openHubAPI(c *HubAPIConfig) (*broker.HubAPI, error) {
	if c == nil {
		return nil, nil
	}
	token, err := readSecret(c.TokenFile)
	if err != nil {
		return nil, err
	}
	tls, err := clientTLS(c.CAFile)
	if err != nil {
		return nil, err
	}
	a := spawnerhook.NewHubAPI(c.URL, token, tls)
	return &broker.HubAPI{Users: a.Users, Stop: a.Stop}, nil
}

func rules(policy []RuleConfig) []broker.Rule {
	var rules []broker.Rule
	for _, r := range policy {
		rules = append(rules, broker.Rule(r))
	}
	return rules
}

func openAttestor(cfg *Config, directory func(broker.ServerKey) (string, error), log *slog.Logger) (attestor, error) {
	if cfg.Servers.Attestation == "process" {
		return processAttestor{spawnerhook.NewProcess()}, nil
	}
	d, err := openDocker(cfg, directory, log)
	if err != nil { // a nil *Docker in an interface would not be nil
		return nil, err
	}
	return d, nil
}

func openDocker(cfg *Config, directory func(broker.ServerKey) (string, error), log *slog.Logger) (*spawnerhook.Docker, error) {
	docker := cfg.Servers.Docker
	// Not directories but what lies in them: users' homes may be beside it.
	private := []string{cfg.Servers.Directory, cfg.Admin.Socket, cfg.Keys.Keyset, cfg.Keys.KEKFile, cfg.Journal}
	for _, h := range cfg.Hubs {
		private = append(private, h.Socket)
	}
	return spawnerhook.NewDocker(spawnerhook.DockerConfig{
		Socket: docker.Socket, Directory: directory, Private: private, Posture: docker.Posture, Trusted: docker.Trusted, Log: log,
	})
}

// checkEngine refuses an engine of a kind that can't be believed. One that is
// down may come up later.
func checkEngine(ctx context.Context, a attestor, log *slog.Logger) error {
	level, err := a.Check(ctx)
	switch {
	case errors.Is(err, broker.ErrDenied):
		return err
	case err != nil:
		log.Warn("containers can't be looked at yet", "err", err)
	default:
		log.Info("attestation", "level", level)
	}
	return nil
}

// processAttestor has nothing to close.
type processAttestor struct{ *spawnerhook.Process }

// Close does nothing.
func (processAttestor) Close() error { return nil }

func openStore(cfg *Config) (*redisstore.Store, error) {
	r := cfg.Store.Redis
	c := redisstore.Config{
		Deployment: cfg.Deployment, Socket: r.Socket, Addr: r.Address, User: r.User, DB: r.DB,
		AllowNoPersistence: r.AllowNoPersistence,
	}
	var err error
	if r.Cluster != nil {
		c.Cluster = r.Cluster.Addresses
	}
	if r.Sentinel != nil {
		c.Sentinel = redisstore.Sentinel{Master: r.Sentinel.Master, Addrs: r.Sentinel.Addresses, User: r.Sentinel.User}
		if r.Sentinel.PasswordFile != "" {
			if c.Sentinel.Password, err = readSecret(r.Sentinel.PasswordFile); err != nil {
				return nil, fmt.Errorf("store.redis.sentinel.password_file: %w", err)
			}
		}
	}
	if r.PasswordFile != "" {
		if c.Password, err = readSecret(r.PasswordFile); err != nil {
			return nil, fmt.Errorf("store.redis.password_file: %w", err)
		}
	}
	if r.TLS || r.CAFile != "" {
		if c.TLS, err = clientTLS(r.CAFile); err != nil {
			return nil, fmt.Errorf("store.redis.ca_file: %w", err)
		}
	}
	return redisstore.Open(c)
}

// clientTLS trusts the authorities in a file, or the system's.
func clientTLS(caFile string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile == "" {
		return c, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	c.RootCAs = x509.NewCertPool()
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", caFile)
	}
	return c, nil
}

func openProviders(cfg *Config, log *slog.Logger) ([]broker.Provider, error) {
	var all []broker.Provider
	for _, name := range slices.Sorted(maps.Keys(cfg.Providers)) {
		p, err := openWatched(name, cfg.Providers[name], log)
		if err != nil {
			return nil, fmt.Errorf("providers.%s: %w", name, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// openWatched opens a provider and, if they are read, its events.
func openWatched(name broker.ProviderID, c ProviderConfig, log *slog.Logger) (broker.Provider, error) {
	p, err := openProvider(name, c, log)
	if err != nil { // a nil *Provider in an interface would not be nil
		return nil, err
	}
	if c.Events == nil {
		return p, nil
	}
	events, err := openEvents(name, c, log)
	if err != nil {
		return nil, err
	}
	return watched{p, events}, nil
}

// use is a as the adapter wants it; nil if there is none.
func (a *RolesAPIConfig) use() *oauthprovider.RolesAPI {
	if a == nil {
		return nil
	}
	return &oauthprovider.RolesAPI{
		URL: a.URL, Path: a.Path, Claim: a.Claim, TokenURL: a.TokenURL,
		Secret: func() (broker.Secret, error) { return readSecret(cmp.Or(a.APIKeyFile, a.TokenFile)) },
	}
}

func openProvider(name broker.ProviderID, c ProviderConfig, log *slog.Logger) (*oauthprovider.Provider, error) {
	var secret broker.Secret
	if c.ClientSecretFile != "" {
		var err error
		if secret, err = readSecret(c.ClientSecretFile); err != nil {
			return nil, fmt.Errorf("client_secret_file: %w", err)
		}
	}
	return oauthprovider.New(oauthprovider.Config{
		Name: name, Profile: c.Profile, Issuer: c.Issuer, DiscoveryURL: c.DiscoveryURL,
		Endpoints: oauthprovider.Endpoints(c.Endpoints),
		ClientID:  c.ClientID, ClientSecret: secret, AuthStyle: c.AuthStyle, PrivateKeyFile: c.PrivateKeyFile,
		CAFile: c.CAFile, Proxy: c.Proxy, RedirectURI: c.RedirectURI, Roles: c.Roles, Audiences: c.Audiences,
		Narrowing: broker.Narrowing(c.Narrowing), Adopt: c.Adopt, Rate: c.Rate, OnLogout: c.OnLogout, Log: log,
		RolesAPI: c.RolesAPI.use(), RefreshEndsAccess: c.RefreshEndsAccess,
	})
}

// A watched provider is one whose events are read.
type watched struct {
	broker.Provider
	events *rolewatch.Keycloak
}

// Check says whether the provider answers now, and tells of its events.
func (w watched) Check(ctx context.Context) error {
	if err := w.Provider.Check(ctx); err != nil {
		return err
	}
	return w.events.Check(ctx)
}

func openEvents(name broker.ProviderID, c ProviderConfig, log *slog.Logger) (*rolewatch.Keycloak, error) {
	secret, err := readSecret(c.Events.ClientSecretFile)
	if err != nil {
		return nil, fmt.Errorf("events.client_secret_file: %w", err)
	}
	transport, err := oauthprovider.Transport(c.CAFile, c.Proxy)
	if err != nil {
		return nil, err
	}
	return rolewatch.NewKeycloak(rolewatch.KeycloakConfig{
		Provider: name, URL: c.Events.URL, ClientID: c.Events.ClientID, ClientSecret: secret, Every: c.Events.Every,
		Transport: transport, Log: log,
	})
}

// watch has what the sources tell followed until ctx ends.
func (p *parts) watch(ctx context.Context, b *broker.Broker) {
	var all sync.WaitGroup
	for _, provider := range p.providers {
		if w, ok := provider.(watched); ok {
			all.Go(func() { w.events.Run(ctx, b) })
		}
	}
	all.Wait()
}

// serve is the life of a broker: open, join, run, and close in reverse. It
// returns when ctx ends or a part gives up. ready is called once everything
// answers.
func serve(ctx context.Context, cfg *Config, stdout io.Writer, log *slog.Logger, ready func(*broker.Broker)) (err error) {
	p, err := open(cfg, stdout, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	watching, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() { watchKeys(watching, p.keys, log) })
	watch.Go(func() { reopenAudit(watching, p.audit, log) })
	defer watch.Wait()
	defer stop()
	if err := p.store.Check(ctx); err != nil {
		return err
	}
	if err := checkEngine(ctx, p.attestor, log); err != nil {
		return err
	}
	b, err := p.broker(cfg, log)
	if err != nil {
		return err
	}
	d, err := openDoors(cfg, b, p.sockets, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	// Before the first hub may speak: what it says rests on what is restored.
	if err := b.Start(ctx); err != nil {
		return err
	}
	watch.Go(func() { p.watch(watching, b) })
	failed := d.serve()
	ready(b)
	select {
	case <-ctx.Done():
		log.Info("stopping")
	case err = <-failed:
	}
	stop()
	watch.Wait() // nobody hints at what is closed
	b.EndWatches()
	d.drain()
	b.Close() // refreshes under way end and are stored
	return err
}
