package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tokenbroker/broker"
	"tokenbroker/broker/redisstore"
	"tokenbroker/broker/seal"
)

// keysEvery is how often a broker reads its keyset anew. It asks instead of being
// told: whatever puts the file there, by copying, renaming or mounting, on this
// host or many, has done enough, and no signal can get lost.
const keysEvery = 2 * time.Second

// watchKeys reads the keyset anew until ctx ends.
func watchKeys(ctx context.Context, keys *seal.Keyset, log *slog.Logger) {
	tick := time.NewTicker(keysEvery)
	defer tick.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		changed, err := keys.Reload()
		switch {
		case err == nil:
			said = ""
		case err.Error() != said: // once; it may be being copied just now
			said = err.Error()
			log.Error("the keyset can't be read anew; the one in memory stays in use", "err", err)
		}
		if changed {
			log.Info("the keyset has changed", "keys", describe(keys.Keys()))
		}
	}
}

func describe(keys []seal.Key) (all []string) {
	for _, k := range keys {
		all = append(all, k.ID.String()+" "+string(k.State))
	}
	return all
}

// A keyring is what the commands about keys work on: the files, the store, and
// what the brokers have said there. None needs a running broker.
type keyring struct {
	keeper broker.KeyKeeper
	store  *redisstore.Store
	files  KeysConfig
	out    io.Writer
}

// loadKeys reads a configuration and opens the keyset that it names.
func loadKeys(file string) (*Config, *seal.Keyset, error) {
	cfg, err := loadConfig(file)
	if err != nil {
		return nil, nil, err
	}
	keys, err := seal.Load(cfg.Keys.Keyset, cfg.Keys.KEKFile)
	return cfg, keys, err
}

// keysAction makes f the body of a command on the keys that a configuration names.
func keysAction(c *cobra.Command, f func(*cobra.Command, *keyring) error) {
	file := configFlag(c)
	c.Args = cobra.NoArgs
	c.RunE = action(func(c *cobra.Command, _ []string) error {
		cfg, keys, err := loadKeys(*file)
		if err != nil {
			return err
		}
		store, err := openStore(cfg)
		if err != nil {
			return err
		}
		defer store.Close()
		return f(c, &keyring{broker.KeyKeeper{Deployment: cfg.Deployment, Store: store, Keys: keys}, store, cfg.Keys, c.OutOrStdout()})
	})
}

// in lists the keys in some state.
func (r *keyring) in(s seal.KeyState) (ids []seal.KeyID) {
	for _, k := range r.keeper.Keys.Keys() {
		if k.State == s {
			ids = append(ids, k.ID)
		}
	}
	return ids
}

// change does one step on the files and reads them anew.
func (r *keyring) change(step func(keyset, kek string) error) error {
	if err := step(r.files.Keyset, r.files.KEKFile); err != nil {
		return err
	}
	_, err := r.keeper.Keys.Reload()
	return err
}

// missing names the brokers of which ok does not hold, or which nobody has seen
// of late.
func (r *keyring) missing(ctx context.Context, ok func(broker.BrokerKeys) bool) (hosts []string, err error) {
	all, err := r.keeper.Brokers(ctx)
	if err != nil {
		return nil, err
	}
	for _, b := range all {
		switch {
		case !b.Present:
			hosts = append(hosts, string(b.Host)+" (not seen "+lately(b.SeenAt)+")")
		case !ok(b):
			hosts = append(hosts, string(b.Host))
		}
	}
	return hosts, nil
}

func lately(t time.Time) string {
	if t.IsZero() {
		return "yet"
	}
	return "since " + t.UTC().Format("2006-01-02 15:04:05Z")
}

func (r *keyring) forget(ctx context.Context, hosts []string) error {
	for _, h := range hosts {
		if err := r.keeper.Forget(ctx, broker.HostID(h)); err != nil {
			return err
		}
	}
	return nil
}

// goneFlag adds --gone.
func goneFlag(c *cobra.Command) *[]string {
	return c.Flags().StringSlice("gone", nil, "hosts whose brokers are gone for good, with their journals")
}

func newKeysRotate() *cobra.Command {
	c := &cobra.Command{
		Use:   "rotate",
		Short: "Give the keyset a new key, and seal everything under it, step by step",
		Long: `Give the keyset a new key, and seal everything under it.

Every broker of the deployment must have a key before any seals under it, so this
goes step by step, and each is taken only once all brokers have taken the one
before: the new key opens; it seals; the records are sealed anew. Brokers read
their keyset again by themselves; on other hosts the file has to be copied there
after each step. Run it again at any time: it goes on where it was.`,
	}
	gone := goneFlag(c)
	wait := c.Flags().Duration("wait", time.Minute, "how long to wait for the brokers before each step")
	keysAction(c, func(c *cobra.Command, r *keyring) error {
		if err := r.forget(c.Context(), *gone); err != nil {
			return err
		}
		return r.rotate(c.Context(), *wait)
	})
	return c
}

func (r *keyring) rotate(ctx context.Context, wait time.Duration) error {
	if len(r.in(seal.Next)) == 0 && len(r.in(seal.Old)) == 0 {
		if err := r.change(func(keyset, kek string) error { _, err := seal.Add(keyset, kek); return err }); err != nil {
			return err
		}
		fmt.Fprintf(r.out, "%s: key %s is new, and opens\n", r.files.Keyset, r.in(seal.Next)[0])
	}
	for _, next := range r.in(seal.Next) {
		err := r.await(ctx, wait, "have key "+next.String(), func(b broker.BrokerKeys) bool { return b.Has(next) })
		if err != nil {
			return err
		}
		if err := r.change(func(keyset, kek string) error { return seal.Promote(keyset, kek, next) }); err != nil {
			return err
		}
		fmt.Fprintf(r.out, "%s: key %s seals from now on\n", r.files.Keyset, next)
	}
	primary := r.in(seal.Primary)[0]
	err := r.await(ctx, wait, "seal under key "+primary.String(), func(b broker.BrokerKeys) bool { return b.SealsUnder(primary) })
	if err != nil {
		return err
	}
	return r.reseal(ctx, primary)
}

// await waits until all brokers say what f wants to hear.
func (r *keyring) await(ctx context.Context, wait time.Duration, what string, f func(broker.BrokerKeys) bool) error {
	said := ""
	for deadline := time.Now().Add(wait); ; {
		hosts, err := r.missing(ctx, f)
		if err != nil || len(hosts) == 0 {
			return err
		}
		names := strings.Join(hosts, ", ")
		if time.Now().After(deadline) {
			return &failure{1, fmt.Errorf("not all brokers %s yet: %s", what, names), fmt.Sprintf("copy %s to these hosts, and run this again; or give those that are gone for good as --gone", r.files.Keyset)}
		}
		if names != said {
			said = names
			fmt.Fprintf(r.out, "waiting for all brokers to %s: %s (on other hosts, copy %s there)\n", what, names, r.files.Keyset)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

func (r *keyring) reseal(ctx context.Context, primary seal.KeyID) error {
	n, told := 0, time.Now()
	strange, err := r.keeper.Reseal(ctx, func(done, all int) {
		n = done
		if time.Since(told) > time.Second {
			told = time.Now()
			fmt.Fprintf(r.out, "sealed anew: %d of %d records\n", done, all)
		}
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(r.out, "all records are sealed under key %s, %d of them anew\n", primary, n-len(strange))
	printStrange(r.out, strange)
	if len(r.in(seal.Old)) > 0 {
		fmt.Fprintln(r.out, "next: tokenbroker keys retire")
	}
	return nil
}

// mostStrange is how many records that don't open are named.
const mostStrange = 20

func printStrange(w io.Writer, all []string) {
	if len(all) == 0 {
		return
	}
	fmt.Fprintf(w, "%s not open:\n", strings.Replace(count(len(all), "record")+" does", "s does", "s do", 1))
	for _, s := range all[:min(len(all), mostStrange)] {
		fmt.Fprintln(w, "  "+s)
	}
	if more := len(all) - mostStrange; more > 0 {
		fmt.Fprintf(w, "  and %d more\n", more)
	}
}

func newKeysRetire() *cobra.Command {
	c := &cobra.Command{
		Use:   "retire",
		Short: "Take the old keys out of use, once nothing needs them",
		Long: `Take the old keys out of use, once nothing needs them.

They stay in the file, so that --undo can take it back, until --destroy removes
them. Do that once there is no backup of Redis left that was made before.`,
	}
	gone := goneFlag(c)
	undo := c.Flags().Bool("undo", false, "put the retired keys back into use, to read a backup that needs them")
	destroy := c.Flags().Bool("destroy", false, "remove the retired keys for good")
	c.MarkFlagsMutuallyExclusive("undo", "destroy")
	keysAction(c, func(c *cobra.Command, r *keyring) error {
		if err := r.forget(c.Context(), *gone); err != nil {
			return err
		}
		switch {
		case *undo:
			return r.undo()
		case *destroy:
			return r.destroy(c.Context())
		}
		return r.retire(c.Context())
	})
	return c
}

func (r *keyring) retire(ctx context.Context) error {
	old := r.in(seal.Old)
	if len(old) == 0 {
		return errors.New("there is no old key to retire")
	}
	if len(r.in(seal.Next)) > 0 {
		return &failure{1, errors.New("a rotation is under way"), "finish it with tokenbroker keys rotate"}
	}
	if err := r.unneeded(ctx, old); err != nil {
		return err
	}
	now := time.Now()
	for _, id := range old {
		if err := r.change(func(keyset, kek string) error { return seal.Disable(keyset, kek, id, now) }); err != nil {
			return err
		}
		fmt.Fprintf(r.out, "%s: key %s opens nothing any more\n", r.files.Keyset, id)
	}
	fmt.Fprintln(r.out, "Copy the file to the other hosts. Once no backup of Redis is older than today: tokenbroker keys retire --destroy")
	return nil
}

// unneeded returns an error if a record, or a broker, needs one of some keys.
func (r *keyring) unneeded(ctx context.Context, ids []seal.KeyID) error {
	// The brokers first: what they still seal is in the store when it is counted.
	hosts, err := r.missing(ctx, func(b broker.BrokerKeys) bool { return !slices.ContainsFunc(ids, b.Needs) })
	if err != nil {
		return err
	}
	if len(hosts) > 0 {
		return &failure{1, fmt.Errorf("brokers may still need the key, for what they seal or have in their journals: %s", strings.Join(hosts, ", ")),
			fmt.Sprintf("see that they run and have %s, and try again in a minute; or give those that are gone for good as --gone", r.files.Keyset)}
	}
	c, err := r.keeper.Count(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		switch {
		case c.Records[id] > 0:
			return &failure{1, fmt.Errorf("key %s still has %s", id, count(c.Records[id], "record")), "seal them anew with tokenbroker keys rotate"}
		case c.Others[id] > 0 && slices.Contains(r.in(seal.Disabled), id):
			return &failure{1, fmt.Errorf("key %s still has %s, of an older backup of the store", id, count(c.Others[id], "record")), "make them readable with tokenbroker keys retire --undo"}
		}
	}
	return nil
}

func (r *keyring) undo() error {
	ids := r.in(seal.Disabled)
	if len(ids) == 0 {
		return errors.New("there is no retired key that could be put back")
	}
	for _, id := range ids {
		if err := r.change(func(keyset, kek string) error { return seal.Enable(keyset, kek, id) }); err != nil {
			return err
		}
		fmt.Fprintf(r.out, "%s: key %s opens again\n", r.files.Keyset, id)
	}
	fmt.Fprintln(r.out, "Copy the file to the other hosts. tokenbroker keys rotate seals anew what needs these keys.")
	return nil
}

func (r *keyring) destroy(ctx context.Context) error {
	ids := r.in(seal.Disabled)
	if len(ids) == 0 {
		return &failure{1, errors.New("there is no retired key to destroy"), "retire the old ones first, with tokenbroker keys retire"}
	}
	if err := r.unneeded(ctx, ids); err != nil {
		return err
	}
	for _, id := range ids {
		if err := r.change(func(keyset, kek string) error { return seal.Destroy(keyset, kek, id) }); err != nil {
			return err
		}
		fmt.Fprintf(r.out, "%s: key %s is gone\n", r.files.Keyset, id)
	}
	fmt.Fprintln(r.out, "Copy the file to the other hosts, and destroy its older copies.")
	return nil
}

func newKeysRewrap() *cobra.Command {
	c := &cobra.Command{
		Use:   "rewrap",
		Short: "Replace the key-encryption key; the keys in the keyset stay what they are",
		Args:  cobra.NoArgs,
	}
	file := configFlag(c)
	c.RunE = action(func(c *cobra.Command, _ []string) error {
		cfg, err := loadConfig(*file)
		if err != nil {
			return err
		}
		if err := seal.Rewrap(cfg.Keys.Keyset, cfg.Keys.KEKFile); err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "%s holds a new key-encryption key, and %s is wrapped by it\n", cfg.Keys.KEKFile, cfg.Keys.Keyset)
		fmt.Fprintln(c.OutOrStdout(), "Copy both to the other hosts, and back both up, each apart from the other. The old key still opens older copies of the keyset: destroy those.")
		fmt.Fprintln(c.OutOrStdout(), "Restart brokers that get the key as a credential of systemd's: until then they don't see the keyset change.")
		return nil
	})
	return c
}

func newKeysStatus() *cobra.Command {
	c := &cobra.Command{Use: "status", Short: "The keys, what is sealed under each, and which the brokers have"}
	keysAction(c, func(c *cobra.Command, r *keyring) error {
		s, err := r.status(c.Context())
		if err != nil {
			return err
		}
		if wantsJSON(c) {
			return printJSON(r.out, s)
		}
		return s.print(r.out)
	})
	return c
}

// A keyStatus is what keys status prints.
type keyStatus struct {
	Keyset  string            `json:"keyset"`
	Keys    []keyStatusKey    `json:"keys"`
	Brokers []keyStatusBroker `json:"brokers"`
	Strange []string          `json:"strange"` // records that don't open
}

type keyStatusKey struct {
	ID      string     `json:"id"`
	State   string     `json:"state"` // next, primary, old, disabled, gone; missing: not in the keyset
	Since   *time.Time `json:"since,omitempty"`
	Records int        `json:"records"` // whether they open or not
}

type keyStatusBroker struct {
	Host    string    `json:"host"`
	SeenAt  time.Time `json:"seen_at"`
	Present bool      `json:"present"`
	Keys    []string  `json:"keys"`    // that it opens
	Sealing []string  `json:"sealing"` // that what it writes may be under
	Journal []string  `json:"journal"` // that its journal needs
}

func (r *keyring) status(ctx context.Context) (*keyStatus, error) {
	c, err := r.keeper.Count(ctx)
	if err != nil {
		return nil, err
	}
	brokers, err := r.keeper.Brokers(ctx)
	if err != nil {
		return nil, err
	}
	s := &keyStatus{Keyset: r.files.Keyset, Strange: append([]string{}, c.Strange...), Brokers: []keyStatusBroker{}}
	for _, k := range r.keeper.Keys.Keys() {
		key := keyStatusKey{ID: k.ID.String(), State: string(k.State), Records: c.Records[k.ID] + c.Others[k.ID]}
		if !k.Since.IsZero() {
			key.Since = &k.Since
		}
		s.Keys = append(s.Keys, key)
		delete(c.Others, k.ID)
	}
	for _, id := range slices.Sorted(maps.Keys(c.Others)) {
		s.Keys = append(s.Keys, keyStatusKey{ID: id.String(), State: "missing", Records: c.Others[id]})
	}
	for _, b := range brokers {
		one := keyStatusBroker{Host: string(b.Host), SeenAt: b.SeenAt, Present: b.Present, Keys: []string{}, Sealing: ids(b.Sealing), Journal: ids(b.Journal)}
		for _, k := range b.Keys {
			if b.Has(k.ID) {
				one.Keys = append(one.Keys, k.ID.String())
			}
		}
		s.Brokers = append(s.Brokers, one)
	}
	return s, nil
}

func ids(keys []seal.KeyID) []string {
	all := []string{}
	for _, k := range keys {
		all = append(all, k.String())
	}
	return all
}

func (s *keyStatus) print(w io.Writer) error {
	t := newTable(w, "KEY", "STATE", "SINCE", "RECORDS")
	for _, k := range s.Keys {
		since := ""
		if k.Since != nil {
			since = k.Since.Format(time.DateOnly)
		}
		t.row(k.ID, k.State, since, strconv.Itoa(k.Records))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	t = newTable(w, "BROKER", "STATE", "OPENS", "SEALS UNDER", "JOURNAL NEEDS")
	for _, b := range s.Brokers {
		state := "runs"
		if !b.Present {
			state = "not seen " + lately(b.SeenAt)
		}
		t.row(b.Host, state, strings.Join(b.Keys, " "), strings.Join(b.Sealing, " "), strings.Join(b.Journal, " "))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(s.Strange) > 0 {
		fmt.Fprintln(w)
	}
	printStrange(w, s.Strange)
	return nil
}
