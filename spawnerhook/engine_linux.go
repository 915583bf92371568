package spawnerhook

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"

	"tokenbroker/broker"
)

// engineTimeout bounds one question to Docker. An engine that hangs must look
// like one that is down.
const engineTimeout = 10 * time.Second

// An engine is Docker as this package needs it. It alone knows the client's
// types, and drops what else Docker tells: the environment of a container and the
// arguments of docker exec are full of secrets.
type engine struct {
	socket string
	// now is nil until the API version was agreed on. The client negotiates once
	// and not safely beside requests, so each connect makes a new one.
	now atomic.Pointer[session]
}

// A session is an engine as it was when we connected; it may come back as another.
type session struct {
	api *client.Client
	engineInfo
}

// A containerState is what Docker says of a container.
type containerState struct {
	ID, Name, Image string
	PID             int32
	StartedAt       time.Time
	Running         bool     // and neither paused, restarting nor on its way out
	Execs           []string // IDs of what was begun in it from outside and has not ended

	posture
}

// An engineInfo is what Docker says of itself.
type engineInfo struct {
	rootless, userns bool
	// noSeccomp: it can't confine a container by seccomp. seccompOff: it does so only
	// if the container's own options say how.
	noSeccomp, seccompOff bool
}

// infoOf reads security options, such as "name=seccomp,profile=default". Profiles
// are "default" or "builtin", "unconfined", or a file, which is the site's to judge.
func infoOf(options []string) engineInfo {
	info := engineInfo{noSeccomp: true}
	for _, option := range options {
		name, rest, _ := strings.Cut(option, ",")
		switch name {
		case "name=rootless":
			info.rootless = true
		case "name=userns":
			info.userns = true
		case "name=seccomp":
			info.noSeccomp, info.seccompOff = false, rest == "profile=unconfined"
		}
	}
	return info
}

// oldestAPI is that of Docker 20.10.
const oldestAPI = 41 // 1.41

var errTooOld = errors.New("this Docker is too old: 20.10 or newer is needed")

// tooOld says whether an engine speaks nothing as new as oldestAPI. A version that
// can't be read is left to the negotiation.
func tooOld(version string) bool {
	minor, ok := strings.CutPrefix(version, "1.")
	n, err := strconv.Atoi(minor)
	return ok && err == nil && n < oldestAPI
}

var errNoContainer = errors.New("there is no such container")

// errOddAnswer: Docker answers, but not with what a container has.
var errOddAnswer = errors.New("docker's answer can't be used")

// connect agrees on an API version and asks the engine about itself, again if that
// was done before: the engine may be another one than yesterday.
func (e *engine) connect(ctx context.Context) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	// Never client.FromEnv: nobody's DOCKER_HOST decides whom a broker believes.
	api, err := client.New(client.WithHost("unix://" + e.socket))
	if err != nil {
		return nil, err
	}
	// Without this the client would hide a refused negotiation and go on with
	// its newest version.
	p, err := api.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true})
	if tooOld(p.APIVersion) {
		err = fmt.Errorf("%w: it speaks API version %s", errTooOld, p.APIVersion)
	}
	if err != nil {
		api.Close()
		return nil, err
	}
	i, err := api.Info(ctx, client.InfoOptions{})
	if err != nil {
		api.Close()
		return nil, fmt.Errorf("ask Docker about itself: %w", err)
	}
	s := &session{api, infoOf(i.Info.SecurityOptions)}
	if old := e.now.Swap(s); old != nil {
		old.api.Close() // only idle connections; a request under way ends normally
	}
	return s, nil
}

// connected is connect where that has not been done yet.
func (e *engine) connected(ctx context.Context) (*session, error) {
	if s := e.now.Load(); s != nil {
		return s, nil
	}
	return e.connect(ctx)
}

func (e *engine) close() {
	if s := e.now.Swap(nil); s != nil {
		s.api.Close()
	}
}

// info asks what kind of engine this is.
func (e *engine) info(ctx context.Context) (info engineInfo, podman bool, err error) {
	s, err := e.connect(ctx)
	if err != nil {
		return engineInfo{}, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	v, err := s.api.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return engineInfo{}, false, fmt.Errorf("ask Docker for its version: %w", err)
	}
	for _, c := range v.Components {
		podman = podman || strings.Contains(strings.ToLower(c.Name), "podman")
	}
	return s.engineInfo, podman, nil
}

// inspect asks for the container of exactly this name. Docker itself would also
// take an ID or the beginning of one.
func (e *engine) inspect(ctx context.Context, name string) (containerState, error) {
	s, err := e.connected(ctx)
	if err != nil {
		return containerState{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	r, err := s.api.ContainerInspect(ctx, name, client.ContainerInspectOptions{})
	if errdefs.IsNotFound(err) || err == nil && r.Container.Name != "/"+name {
		return containerState{}, errNoContainer
	}
	if err != nil {
		return containerState{}, err
	}
	c, err := stateOf(r.Container)
	c.NoSeccomp, c.SeccompOff = s.noSeccomp, s.seccompOff
	return c, err
}

// stateOf takes what we need from an answer.
func stateOf(c container.InspectResponse) (containerState, error) {
	if c.State == nil || c.HostConfig == nil || c.Config == nil || !fullID(c.ID) {
		return containerState{}, fmt.Errorf("%w on container %q: it lacks its state, configuration or ID", errOddAnswer, c.Name)
	}
	started, err := time.Parse(time.RFC3339Nano, c.State.StartedAt)
	if err != nil {
		return containerState{}, fmt.Errorf("%w on container %q: %w", errOddAnswer, c.Name, err)
	}
	s := c.State
	return containerState{
		ID:        c.ID,
		Name:      strings.TrimPrefix(c.Name, "/"),
		Image:     c.Config.Image,
		PID:       int32(s.Pid),
		StartedAt: started,
		Running:   s.Running && !s.Paused && !s.Restarting && !s.Dead && s.Pid > 0,
		Execs:     c.ExecIDs,
		posture:   postureOf(c.HostConfig),
	}, nil
}

// postureOf takes from a configuration what bears on identity.
func postureOf(h *container.HostConfig) posture {
	p := posture{
		Privileged: h.Privileged, PidMode: string(h.PidMode), NetworkMode: string(h.NetworkMode), IpcMode: string(h.IpcMode),
		UsernsMode: string(h.UsernsMode), CgroupnsMode: string(h.CgroupnsMode), Runtime: h.Runtime,
		CapAdd: h.CapAdd, SecurityOpt: h.SecurityOpt, MaskedPaths: h.MaskedPaths, ReadonlyPaths: h.ReadonlyPaths,
		DeviceCgroupRules: h.DeviceCgroupRules,
	}
	for _, d := range h.Devices {
		p.Devices = append(p.Devices, d.PathOnHost)
	}
	return p
}

// running lists the containers that run, or are paused.
func (e *engine) running(ctx context.Context) ([]container.Summary, error) {
	s, err := e.connected(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	r, err := s.api.ContainerList(ctx, client.ContainerListOptions{})
	return r.Items, err
}

// list returns the names of the containers that run.
func (e *engine) list(ctx context.Context) ([]string, error) {
	all, err := e.running(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, c := range all {
		for _, name := range c.Names { // others are links, as in /web/db
			if name = strings.TrimPrefix(name, "/"); !strings.Contains(name, "/") {
				names = append(names, name)
				break
			}
		}
	}
	return names, nil
}

// exec asks for the command line of an exec, as events have it. The client's own
// question drops it. Where a proxy does not let the question through, or what comes
// can't be read, it is empty.
func (e *engine) exec(ctx context.Context, id string) (command string, running bool, err error) {
	s, err := e.connected(ctx)
	if err != nil {
		return "", false, err
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	dial := s.api.Dialer()
	docker := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/v"+s.api.ClientVersion()+"/exec/"+id+"/json", nil)
	if err != nil {
		return "", false, err
	}
	answer, err := docker.Do(r)
	if err != nil {
		return "", false, err
	}
	defer answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusOK:
		command, running = execAnswer(answer.Body)
		return command, running, nil
	case http.StatusNotFound:
		return "", false, nil
	}
	return "", true, nil
}

// maxExecAnswer is more than the kernel lets a command line be.
const maxExecAnswer = 16 << 20

// execAnswer reads an answer on an exec.
func execAnswer(body io.Reader) (command string, running bool) {
	var a struct {
		Running       bool
		ProcessConfig struct {
			Entrypoint string
			Arguments  []string
		}
	}
	if json.NewDecoder(io.LimitReader(body, maxExecAnswer)).Decode(&a) != nil {
		return "", true
	}
	p := a.ProcessConfig
	return p.Entrypoint + " " + strings.Join(p.Arguments, " "), a.Running
}

// fullID says whether s is a container's ID as cgroup paths carry it.
func fullID(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// watched are the events after which a look at a container may find something
// else than before, and the command that somebody runs in one. As soon as an
// exec event is asked for Docker compares beginnings.
var watched = []string{"start", "die", "destroy", "rename", "unpause", execStart, execDie}

const execStart, execDie = "exec_start", "exec_die"

// A listener is told what Docker tells.
type listener struct {
	subscribed func() // from now on nothing is missed
	changed    func(name string)
	ran        func(execKey, broker.Exec)
	ended      func(execKey)
}

// An execKey names a command that was begun in a container from outside.
type execKey struct{ container, id string }

// events tells l of each container that something happens to, until the stream
// ends. Events after since are told again, if the engine still has them; last is
// the time of the last one that was told.
func (e *engine) events(ctx context.Context, since time.Time, l listener) (last time.Time, err error) {
	last = since
	s, err := e.connect(ctx)
	if err != nil {
		return last, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	began := time.Now()
	stream := s.api.Events(ctx, client.EventsListOptions{
		Since:   fmt.Sprintf("%d.%09d", since.Unix(), since.Nanosecond()),
		Filters: make(client.Filters).Add("type", "container").Add("event", watched...),
	})
	l.subscribed()
	for {
		select {
		case m := <-stream.Messages:
			l.tell(m, began)
			last = time.Unix(0, m.TimeNano+1)
		case err := <-stream.Err:
			return last, err
		}
	}
}

// tell tells of an event. What was before began is told by an engine that remembers.
func (l listener) tell(m events.Message, began time.Time) {
	name := strings.TrimPrefix(m.Actor.Attributes["name"], "/")
	// An image can have a label that takes the place of this one.
	exec := execKey{m.Actor.ID, m.Actor.Attributes["execID"]}
	if command, ok := strings.CutPrefix(string(m.Action), execStart+": "); ok {
		x := execOf(m.Actor.ID, name, command)
		if at := time.Unix(0, m.TimeNano); at.Before(began) {
			x.Afterwards = "it began at " + at.UTC().Format(time.RFC3339) + ", when the broker did not listen to Docker"
		}
		l.ran(exec, x)
		return
	}
	if m.Action == execDie {
		l.ended(exec)
		return
	}
	if m.Action == events.ActionDie {
		l.ended(execKey{container: m.Actor.ID})
	}
	l.changed(name)
	// Among the attributes are the image's labels, so look at this one only where
	// Docker sets it.
	if m.Action == events.ActionRename {
		l.changed(strings.TrimPrefix(m.Actor.Attributes["oldName"], "/"))
	}
}

// execOf keeps of a command line the program's name. Docker joins the arguments by
// spaces, so what is the program's when it has some in its name can't be known.
func execOf(container, name, command string) broker.Exec {
	x := broker.Exec{Container: container, Name: name, Command: "?"}
	if words := strings.Fields(command); len(words) > 0 {
		x.Command = path.Base(words[0])
	}
	x.Command = x.Command[:min(len(x.Command), 64)]
	sum := sha256.Sum256([]byte(command))
	x.Alike = string(sum[:])
	return x
}
