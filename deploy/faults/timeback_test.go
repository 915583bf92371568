//go:build failpoints && linux

package faults_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// A fall is a way for a store to forget.
type fall struct {
	name     string
	settings []string // of Redis
	before   func(*past)
	after    func(*past) // in the place of a kill and a start
	// kept says that Redis can have confirmed the disconnect, forgets that it
	// forgets it although it had, and empty that it forgets everything.
	kept, forgets, empty bool
	short                bool // is in the short form, too
}

var falls = []fall{
	{name: "killed, appendfsync always", settings: []string{"appendfsync always"}, kept: true},
	{name: "killed, appendfsync everysec", settings: []string{"appendfsync everysec"}, kept: true, short: true},
	{name: "killed, appendfsync no", settings: []string{"appendfsync no"}, kept: true},
	{name: "killed, snapshots only", settings: []string{"appendonly no"}, before: (*past).save, forgets: true, short: true},
	{name: "killed, no persistence", settings: []string{"appendonly no"}, forgets: true, empty: true},
	{name: "FLUSHALL", after: (*past).flush, kept: true, forgets: true, empty: true, short: true},
	// Synced at once, so that the copy has all that was answered until then.
	{name: restored, short: true, settings: []string{"appendfsync always"}, before: (*past).copyFiles, after: (*past).restoreFiles, kept: true, forgets: true},
	{name: "older dump restored", settings: []string{"appendonly no"}, before: (*past).copyDump, after: (*past).restoreFiles, forgets: true},
	{name: "stale replica promoted", before: (*past).partition, after: (*past).promote, forgets: true, short: true},
}

// restored is the fall of which the short form, too, has all knowers.
const restored = "older append-only file restored"

// Knowers: who knows of a change when the store forgets it. The first broker
// makes it.
const (
	lives   = "its maker lives"
	back    = "its maker comes back"
	seen    = "its maker is gone, another has seen it"
	nowhere = "its maker is gone, nobody has seen it"
)

// A store that goes back in time brings back no grant that was disconnected, and no
// role that was taken away, as long as one broker lives that made the change or
// has seen its effect, or Redis had confirmed it. That the store fell back is in
// the log. What nobody but a host that is gone knew is a declared window, of which
// the answer to the disconnect has warned unless Redis itself was put back.
func TestNothingComesBackFromThePast(t *testing.T) {
	for _, f := range falls {
		for _, who := range []string{lives, back, seen, nowhere} {
			if !*long && (!f.short || who != lives && f.name != restored) {
				continue
			}
			t.Run(f.name+", "+who, func(t *testing.T) {
				t.Parallel()
				newPast(t, f, who).run()
			})
		}
	}
}

// A past is a world whose Redis goes back to it.
type past struct {
	*world
	t *testing.T // before there is a world, too
	fall
	who     string
	redis   *brokertest.Redis
	replica *brokertest.Redis
	wire    *gate
	files   string // a copy of Redis' files
	row     row
}

func newPast(t *testing.T, f fall, who string) *past {
	t.Helper()
	p := &past{t: t, fall: f, who: who}
	settings := f.settings
	if f.name == "stale replica promoted" {
		port := brokertest.FreePort(t)
		p.redis = brokertest.StartRedis(t, append(settings, fmt.Sprint("port ", port), "bind 127.0.0.1", "protected-mode no", "repl-diskless-sync-delay 0")...)
		p.wire = newGate(t, fmt.Sprint("127.0.0.1:", port))
		host, port2, _ := net.SplitHostPort(p.wire.Addr().String())
		p.replica = brokertest.StartRedis(t, "replicaof "+host+" "+port2)
		p.until("the replica follows", func() bool { return p.info(p.redis, "state=online") && p.info(p.replica, "master_link_status:up") })
	} else {
		p.redis = brokertest.StartRedis(t, settings...)
	}
	// The brokers know Redis by a name that a promotion can move.
	dir, err := os.MkdirTemp("", "past-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	name := filepath.Join(dir, "redis")
	if err := os.Symlink(p.redis.Socket, name); err != nil {
		t.Fatal(err)
	}
	p.files = filepath.Join(dir, "files")
	p.world = newWorld(t, strict, 2, func(w *world) { w.setup.Redis = name })
	p.row = row{proof: "back in time", cell: f.name + ", " + who, window: who == nowhere && f.forgets && !f.empty}
	return p
}

// People are logged in in three groups.
const (
	cut    = iota // who is disconnected
	lesser        // whose role is taken away; another is left
	others        // to whom nothing happens
)

// people are the users of a group.
func people(group int) (users []string) {
	n := pick(5, 2)
	for i := range n {
		users = append(users, fmt.Sprintf("user%d", group*n+i))
	}
	return users
}

func (p *past) run() {
	p.t.Helper()
	for group := range 3 {
		for _, user := range people(group) {
			p.login(user)
			p.row.runs++
		}
	}
	if p.before != nil {
		p.before(p)
	}
	maker, other := p.brokers[0], p.brokers[1]
	if p.who == nowhere {
		other.stop()
	}
	p.change(maker)
	time.Sleep(lease)
	living := []*process{maker, other}
	switch p.who {
	case seen:
		p.see(other)
		fallthrough
	case nowhere:
		living = living[1:]
		fallthrough
	case back:
		maker.end()
	}
	p.goBack()
	switch p.who {
	case back:
		maker.start()
	case nowhere:
		other.signal(syscall.SIGCONT)
	}
	p.ask(living)
	p.said(living)
	report.add(p.row)
	if !p.row.window && p.row.served > 0 || !p.empty && p.row.lost > 0 {
		p.t.Errorf("%s: %d served, %d lost", p.row.cell, p.row.served, p.row.lost)
	}
}

// change has the maker cut off and demote.
func (p *past) change(maker *process) {
	var all sync.WaitGroup
	for _, user := range people(cut) {
		all.Go(func() {
			r := p.reply(maker, "Disconnect", Call{User: user})
			if r.Code != "" || (r.NotKept == "") != p.kept {
				p.t.Errorf("disconnect %s: %+v; whether it is kept should be known: %t", user, r, p.kept)
			}
		})
	}
	for _, user := range people(lesser) {
		p.idp.SetRoles(user, "guest")
		r := p.reply(maker, "SetRoles", Call{User: user, Roles: []string{"guest"}})
		if lags := p.wire != nil && r.Code == string(broker.Unavailable); r.Code != "" && !lags { // and it is done all the same
			p.t.Errorf("set the roles of %s: %+v", user, r)
		}
	}
	all.Wait()
}

// see has b's callers see what has changed.
func (p *past) see(b *process) {
	for group, code := range map[int]broker.Code{cut: broker.Revoked, lesser: broker.Denied} {
		for _, user := range people(group) {
			if r := p.reply(b, "Token", Call{User: user, Scopes: scopes}); r.Code != string(code) {
				p.t.Errorf("%s is told %+v, want %s", user, r, code)
			}
		}
	}
}

func (p *past) goBack() {
	if p.after != nil {
		p.after(p)
		return
	}
	p.redis.Kill()
	p.redis.Start()
}

// askFor is for how long everybody is asked after the fall: longer than a broker
// waits for the others to look.
const askFor = 4 * time.Second

// ask asks the living for everybody's token from the moment that Redis is back,
// and judges what they are told: meanwhile, and in the end.
func (p *past) ask(living []*process) {
	var all sync.WaitGroup
	var mu sync.Mutex // guards the row
	for group := range 3 {
		for _, user := range people(group) {
			all.Go(func() {
				served, lost := p.askOne(living, group, user)
				mu.Lock()
				defer mu.Unlock()
				p.row.served += served
				p.row.lost += lost
			})
		}
	}
	all.Wait()
	if p.empty {
		p.row.note = "everyone logs in again"
	}
}

// askOne returns 1 for each that is so of the user.
func (p *past) askOne(living []*process, group int, user string) (served, lost int) {
	n := 500
	for deadline := time.Now().Add(askFor); ; time.Sleep(100 * time.Millisecond) {
		var last []Reply
		for _, b := range living {
			n++
			all := p.reply(b, "Token", Call{User: user, Scopes: scopes}) // is in every cache
			fresh := p.reply(b, "Token", Call{User: user, Scopes: subset(n | 1<<9 - 1)})
			own := p.reply(b, "Token", Call{User: user, Scopes: guests})
			if group != others && (all.Code == "" || fresh.Code == "") || group == cut && own.Code == "" {
				served = 1
			}
			last = append(last, own)
		}
		if time.Now().Before(deadline) {
			continue
		}
		for _, r := range last {
			if group != cut && r.Code != "" {
				lost = 1
				if !r.lost() {
					p.t.Errorf("%s is told %+v", user, r)
				}
			}
			if group == cut && !p.empty && !p.row.window && r.Code != string(broker.Revoked) {
				p.t.Errorf("%s, who is cut off, is told %+v", user, r)
			}
		}
		return served, lost
	}
}

// said fails unless the logs say what happened.
func (p *past) said(living []*process) {
	p.t.Helper()
	var logs strings.Builder
	for _, b := range living {
		logs.WriteString(p.log(p.t, b))
	}
	const forgot = "the store has forgotten what was written last"
	want := [][]string{{forgot, "the store has restarted, or another server has taken its place"}}
	if p.after != nil && p.empty { // it has not even restarted
		want = [][]string{{forgot}}
	}
	if p.forgets && !p.empty && p.who != nowhere {
		want = append(want, []string{"the store fell back to an older grant"})
	}
	for _, lines := range want {
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(logs.String(), l) }) {
			p.t.Errorf("%s: nobody is told: %s", p.row.cell, lines[0])
		}
	}
}

// A Redis that dies with what the disk had not got yet, before the disconnect was
// answered: the answer is still true.
func TestDisconnectIsTrueAlthoughItsRecordIsLostMeanwhile(t *testing.T) {
	t.Parallel()
	p := newPast(t, fall{name: "killed before the answer, its last second lost", forgets: true}, lives)
	users := people(cut)
	for _, user := range users {
		p.login(user)
	}
	p.copyFiles()
	maker := p.brokers[0]
	answers := make(chan Reply, len(users))
	for _, user := range users {
		go func() { answers <- p.reply(maker, "Disconnect", Call{User: user}) }()
	}
	for _, user := range users {
		p.until("the maker has written it", func() bool {
			return p.reply(maker, "Token", Call{User: user, Scopes: scopes}).Code == string(broker.Revoked)
		})
	}
	if len(answers) > 0 {
		t.Fatal("it was answered before the disk can have had it")
	}
	p.redis.Kill()
	p.copy(p.files, p.redis.Dir)
	p.redis.Start()
	for range users {
		if r := <-answers; r.Code != "" || r.NotKept != "" {
			t.Errorf("disconnect: %+v", r)
		}
	}
	maker.end() // and what was answered is so without it
	p.row.runs = len(users)
	for _, user := range users {
		served, _ := p.askOne(p.brokers[1:], cut, user)
		p.row.served += served
	}
	report.add(p.row)
	if p.row.served > 0 {
		t.Errorf("%d served", p.row.served)
	}
}

// A broker dies with a new refresh token in its journal and nowhere else, others
// take the user's rights away, and it comes back: the token is not stored over a
// disconnect, but revoked; and it does not bring back a role.
func TestJournalOfADeadBrokerBringsNoRightsBack(t *testing.T) {
	for name, group := range map[string]int{"a disconnect": cut, "a role taken away": lesser} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, strict, 2)
			r := row{proof: "back in time", cell: "a dead broker's journal, after " + name, runs: pick(20, 2)}
			for i := range r.runs {
				user := fmt.Sprintf("user%d", i)
				served, lost := w.replay(user, group)
				r.served += served
				r.lost += lost
			}
			report.add(r)
			if r.served+r.lost > 0 {
				t.Errorf("%d served, %d lost", r.served, r.lost)
			}
			for _, b := range w.brokers {
				if n := strings.Count(w.log(t, b), "the store fell back to an older grant"); n > r.runs {
					t.Errorf("%s says %d times that the store fell back, of %d grants", b.host, n, r.runs)
				}
			}
		})
	}
}

func (w *world) replay(user string, group int) (served, lost int) {
	w.t.Helper()
	dying, other := w.brokers[0], w.brokers[1]
	w.login(user)
	w.idp.count()
	w.reply(dying, "Arm", Call{Step: "after journal"})
	if r, err := dying.call("Token", Call{User: user, Scopes: subset(1)}); err == nil {
		w.t.Fatalf("the broker was not killed: %+v", r)
	}
	dying.killed()
	if group == cut {
		w.reply(other, "Disconnect", Call{User: user})
	} else {
		w.setRoles(other, user, "guest")
	}
	dying.start()
	for _, b := range w.brokers {
		for n := range 3 {
			if r := w.reply(b, "Token", Call{User: user, Scopes: subset(513 + n)}); r.Code == "" { // with s9
				served = 1
			}
		}
		if r := w.reply(b, "Token", Call{User: user, Scopes: guests}); group == lesser && r.lost() {
			lost = 1
		} else if (group == lesser) != (r.Code == "") {
			w.t.Errorf("%s is told %+v", user, r)
		}
	}
	if group != cut {
		return served, lost
	}
	for deadline := time.Now().Add(20 * time.Second); w.idp.lives() > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Errorf("%d refresh tokens still work at the provider", w.idp.lives())
			break
		}
	}
	return served, lost
}

// --- what is done to Redis ---

func (p *past) command(r *brokertest.Redis, words ...string) {
	p.t.Helper()
	if _, err := r.Ask("", words...); err != nil {
		p.t.Fatalf("%q: %v", words, err)
	}
}

func (p *past) info(r *brokertest.Redis, want string) bool {
	answer, err := r.Ask("", "INFO")
	return err == nil && strings.Contains(answer, want)
}

func (p *past) until(what string, f func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func (p *past) save()  { p.command(p.redis, "SAVE") }
func (p *past) flush() { p.command(p.redis, "FLUSHALL") }

func (p *past) copyDump() {
	p.save()
	p.copyFiles()
}

// copyFiles is a backup of Redis' directory while it runs.
func (p *past) copyFiles() {
	p.t.Helper()
	p.until("the append-only file is written", func() bool { return p.info(p.redis, "aof_rewrite_in_progress:0") })
	p.copy(p.redis.Dir, p.files)
}

func (p *past) copy(from, to string) {
	p.t.Helper()
	if err := os.MkdirAll(to, 0o700); err != nil {
		p.t.Fatal(err)
	}
	for _, name := range []string{"appendonlydir", "dump.rdb"} {
		os.RemoveAll(filepath.Join(to, name))
		if _, err := os.Stat(filepath.Join(from, name)); err != nil {
			continue
		}
		if out, err := exec.Command("cp", "-r", filepath.Join(from, name), to).CombinedOutput(); err != nil {
			p.t.Fatalf("copy %s: %s", name, out)
		}
	}
}

func (p *past) restoreFiles() {
	p.t.Helper()
	p.save() // whatever it has by now is not what it will have
	p.redis.Kill()
	p.copy(p.files, p.redis.Dir)
	p.redis.Start()
}

func (p *past) partition() { p.wire.shut() }

func (p *past) promote() {
	p.t.Helper()
	p.redis.Kill()
	p.command(p.replica, "REPLICAOF", "NO", "ONE")
	next := p.setup.Redis + ".next"
	if err := os.Symlink(p.replica.Socket, next); err != nil {
		p.t.Fatal(err)
	}
	if err := os.Rename(next, p.setup.Redis); err != nil {
		p.t.Fatal(err)
	}
}

// A gate is a wire to a server that can be shut: then it stands, and nothing
// arrives.
type gate struct {
	net.Listener
	mu sync.Mutex // held while it is shut
}

func newGate(t *testing.T, to string) *gate {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{Listener: l}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			t.Cleanup(func() { near.Close(); far.Close() })
			go g.copy(near, far)
			go g.copy(far, near)
		}
	}()
	return g
}

func (g *gate) shut() { g.mu.Lock() }

func (g *gate) copy(from io.Reader, to io.Writer) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		g.mu.Lock()
		_, err = to.Write(buf[:n])
		g.mu.Unlock()
		if err != nil {
			return
		}
	}
}
