package spawnerhook_test

import (
	"strings"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// execsOf watches a lab and returns what is told of commands and of containers.
func execsOf(t *testing.T, l *lab, since time.Time) (execs chan broker.Exec, names chan string, stop func()) {
	execs, names = make(chan broker.Exec, 1000), make(chan string, 10000)
	stop = watchSince(t, l.docker, since, func(name string) { names <- name }, func(x broker.Exec) { execs <- x })
	within(t, "first hint", names)
	return execs, names, stop
}

// nothingMore fails the test if more commands are told of than were taken. What comes
// before the hint is told before it.
func nothingMore(t *testing.T, l *lab, execs chan broker.Exec, names chan string) {
	t.Helper()
	l.lookedAround(t)
	l.engine.Create(t, "mark", nil)
	l.engine.Start("mark", 1)
	for within(t, "the mark", names) != "mark" {
	}
	l.engine.Remove("mark")
	for within(t, "the mark's end", names) != "mark" {
	}
	for {
		select {
		case x := <-execs:
			t.Errorf("Watch also tells %+v", x)
		default:
			return
		}
	}
}

// lookedAround waits until what runs now was looked at.
func (l *lab) lookedAround(t *testing.T) {
	t.Helper()
	const name = "looked-at"
	l.engine.Start(name, l.process(t, l.engine.Create(t, name, []byte(readTestdata(t, "e29-inspect-privileged.json")))).pid)
	lowered := func() bool { _, why := l.docker.Worth("pidfd"); return why != "" }
	await(t, "a look at a neighbour", lowered)
	l.engine.Remove(name)
	await(t, "a look after its end", func() bool { return !lowered() })
}

func TestCommandsThatBeganUnseenAreToldOnce(t *testing.T) {
	const secret = "/bin/sh -c 'echo hunter2'"
	visited := func(t *testing.T, inspect []byte) (l *lab, id string) {
		l = newLab(t)
		id = l.engine.Create(t, "visited", inspect)
		l.engine.Start("visited", l.process(t, id).pid)
		return l, id
	}
	told := func(t *testing.T, execs chan broker.Exec, id, command, afterwards string) {
		t.Helper()
		x := within(t, "command", execs)
		if x.Container != id || x.Name != "visited" || x.Command != command || !strings.HasPrefix(x.Afterwards, afterwards) ||
			(x.Afterwards == "") != (afterwards == "") || strings.Contains(x.Alike+x.Afterwards, "hunter2") {
			t.Errorf("Watch tells %+v, want %s of %s: %q", x, command, id, afterwards)
		}
	}
	restart := func(t *testing.T, e *brokertest.Engine) { // it forgets its events
		t.Helper()
		e.Down()
		if err := e.Up(); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("running when the watch begins, and after it is connected again", func(t *testing.T) {
		l, id := visited(t, nil)
		l.engine.Exec("visited", secret)
		restart(t, l.engine)
		execs, names, _ := execsOf(t, l, time.Time{})
		told(t, execs, id, "sh", "it was found running")
		l.lookedAround(t) // else it waits for some seconds
		restart(t, l.engine)
		within(t, "hint after a restart of the engine", names)
		nothingMore(t, l, execs, names)
	})
	t.Run("told by an event, and still running after a break", func(t *testing.T) {
		l, id := visited(t, nil)
		execs, names, _ := execsOf(t, l, time.Time{})
		l.lookedAround(t) // or it may be found
		l.engine.Exec("visited", secret)
		told(t, execs, id, "sh", "")
		restart(t, l.engine)
		within(t, "hint after a restart of the engine", names)
		nothingMore(t, l, execs, names)
	})
	t.Run("begun in a break", func(t *testing.T) {
		l, id := visited(t, nil)
		execs, names, _ := execsOf(t, l, time.Time{})
		l.lookedAround(t)
		l.engine.Down()
		l.engine.Exec("visited", secret)
		l.engine.EndExec("visited", l.engine.Exec("visited", "ls"))
		if err := l.engine.Up(); err != nil {
			t.Fatal(err)
		}
		told(t, execs, id, "sh", "it was found running")
		nothingMore(t, l, execs, names)
	})
	t.Run("begun and ended between two watches", func(t *testing.T) {
		l, id := visited(t, nil)
		execs, _, stop := execsOf(t, l, time.Time{})
		l.lookedAround(t)
		kept := l.engine.Exec("visited", "top -b")
		told(t, execs, id, "top", "")
		stop()
		since := time.Now()
		l.engine.EndExec("visited", l.engine.Exec("visited", secret))
		l.engine.EndExec("visited", l.engine.Exec("visited", "/usr/bin/tail -f /secret"))
		execs, names, _ := execsOf(t, l, since)
		told(t, execs, id, "sh", "it began at 20")
		told(t, execs, id, "tail", "it began at 20")
		l.engine.EndExec("visited", kept)
		nothingMore(t, l, execs, names)
	})
	t.Run("both replayed and found", func(t *testing.T) {
		l, id := visited(t, nil)
		l.engine.Exec("visited", secret)
		execs, names, _ := execsOf(t, l, time.Now().Add(-time.Minute))
		x := within(t, "command", execs)
		if x.Container != id || x.Command != "sh" || x.Afterwards == "" {
			t.Errorf("Watch tells %+v", x)
		}
		nothingMore(t, l, execs, names)
	})
	t.Run("where nobody may ask what it is", func(t *testing.T) {
		l, id := visited(t, nil)
		l.engine.HideExecs()
		l.engine.Exec("visited", secret)
		restart(t, l.engine)
		execs, names, _ := execsOf(t, l, time.Time{})
		told(t, execs, id, "?", "it was found running")
		nothingMore(t, l, execs, names)
	})
	t.Run("an image that numbers all commands alike", func(t *testing.T) {
		l, id := visited(t, []byte(`{"Config": {"Image": "evil", "Labels": {"execID": "1"}}, "State": {}, "HostConfig": {"MaskedPaths": ["/proc/kcore"], "ReadonlyPaths": ["/proc/sys"]}}`))
		execs, _, _ := execsOf(t, l, time.Time{})
		l.lookedAround(t)
		for range 3 {
			l.engine.Exec("visited", secret)
			told(t, execs, id, "sh", "")
		}
	})
}
