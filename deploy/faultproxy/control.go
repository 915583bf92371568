package main

import (
	"encoding/json"
	"maps"
	"net/http"
)

// control answers the test:
//
//	GET    /calls           {"counts": {kind: number}, "calls": [call, …]}
//	GET    /refresh-tokens  {token: user or subject}; the needles of a leak search
//	POST   /faults          adds a fault
//	DELETE /faults          clears all faults and ends their delays
func (p *proxy) control() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /calls", p.getCalls)
	mux.HandleFunc("GET /refresh-tokens", p.getTokens)
	mux.HandleFunc("POST /faults", p.postFault)
	mux.HandleFunc("DELETE /faults", p.deleteFaults)
	return mux
}

func (p *proxy) getCalls(w http.ResponseWriter, _ *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	counts := map[string]int{}
	for _, c := range p.calls {
		counts[c.Kind]++
	}
	answerJSON(w, map[string]any{"counts": counts, "calls": p.calls})
}

func (p *proxy) getTokens(w http.ResponseWriter, _ *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	owners := maps.Clone(p.tokens)
	for token, sub := range owners {
		if name := p.users[sub]; name != "" {
			owners[token] = name
		}
	}
	answerJSON(w, owners)
}

func (p *proxy) postFault(w http.ResponseWriter, r *http.Request) {
	f := &fault{cleared: make(chan struct{})}
	in := json.NewDecoder(r.Body)
	in.DisallowUnknownFields()
	if err := in.Decode(f); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f.left = f.Times
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = append(p.faults, f)
	w.WriteHeader(http.StatusNoContent)
}

func (p *proxy) deleteFaults(w http.ResponseWriter, _ *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.faults {
		close(f.cleared)
	}
	p.faults = nil
	w.WriteHeader(http.StatusNoContent)
}

func answerJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}
