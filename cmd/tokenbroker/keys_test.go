package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/seal"
)

// What the commands about keys say of records, from a rotation to a backup that
// is older than it.
func TestAKeyIsRetiredOnlyWhenNoRecordNeedsIt(t *testing.T) {
	redis := brokertest.StartRedis(t)
	path := site(t, minimal+"store: {redis: {socket: "+redis.Socket+"}}\n")
	dir := filepath.Dir(path)
	keys, err := seal.Load(filepath.Join(dir, "keyset.json"), filepath.Join(dir, "kek"))
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	store, err := openStore(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	k := broker.Key{Kind: "grant", Parts: []string{"main", "keycloak", "alice"}}
	box, err := keys.Seal([]byte("{}"), seal.Place{"default", "grant", "main", "keycloak", "alice", "1"})
	if err != nil {
		t.Fatal(err)
	}
	putBack := func() {
		t.Helper()
		if r, err := store.Get(t.Context(), k); err == nil {
			store.Delete(t.Context(), k, r.Revision)
		}
		if err := store.Put(t.Context(), k, 0, box, 0); err != nil {
			t.Fatal(err)
		}
	}
	putBack()
	first, _ := seal.KeyOf(box)

	for _, step := range []struct {
		why  string
		do   func()
		args string
		code int
		want []string
	}{
		{"a new installation has one key", nil, "status", 0, []string{first.String() + "  primary  -      1"}},
		{"without brokers nobody is waited for", nil, "rotate", 0, []string{"1 of them anew", "next: tokenbroker keys retire"}},
		{"a rotation that is done is not done again", nil, "rotate", 0, []string{"0 of them anew"}},
		{"a record turns up that needs the old key", putBack, "retire", 1, []string{"key " + first.String() + " still has 1 record", "hint: seal them anew with tokenbroker keys rotate"}},
		{"it is sealed anew", nil, "rotate", 0, []string{"1 of them anew"}},
		{"nothing needs the old key", nil, "retire", 0, []string{"opens nothing any more"}},
		{"a backup that is older is put back", putBack, "status", 0, []string{first.String() + "  disabled", `grant["main" "keycloak" "alice"]: it was sealed under ` + first.String() + ", which was retired on"}},
		{"what it needs is not destroyed", nil, "retire --destroy", 1, []string{"still has 1 record, of an older backup", "keys retire --undo"}},
		{"it can be read again", nil, "retire --undo", 0, []string{"opens again"}},
		{"and sealed anew", nil, "rotate", 0, []string{"1 of them anew"}},
		{"retired once more", nil, "retire", 0, nil},
		{"destroyed", nil, "retire --destroy", 0, []string{"is gone"}},
		{"and not twice", nil, "retire --destroy", 1, []string{"there is no retired key to destroy"}},
		{"the backup needs what is gone", putBack, "status", 0, []string{"gone", "destroyed since"}},
		{"the next rotation goes on without that record", nil, "rotate", 0, []string{"1 record does not open", "destroyed since"}},
		{"a new key-encryption key", nil, "rewrap", 0, []string{"Copy both to the other hosts"}},
		{"opens the same", nil, "status -o json", 0, []string{`"state": "primary"`, `"id": "` + first.String()}},
	} {
		if step.do != nil {
			step.do()
		}
		var out bytes.Buffer
		args := append([]string{"keys"}, strings.Fields(step.args)...)
		if code := run(t.Context(), append(args, "-c", path), &out, &out); code != step.code {
			t.Fatalf("%s: keys %s: exit code %d: %s", step.why, step.args, code, &out)
		}
		for _, want := range step.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: keys %s: got\n%s\nwant it to say %q", step.why, step.args, &out, want)
			}
		}
	}
}
