//go:build !release

package devidp

import (
	"html/template"
	"net/http"
	"net/url"
)

// page is the login: a click in the place of a password.
var page = template.Must(template.New("login").Parse(`<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Development login</title>
<style>
  body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem }
  .loud { border: 3px solid #b00; padding: .5rem 1rem }
  button { display: block; width: 100%; margin: .5rem 0; padding: .8rem 1rem; font: inherit; text-align: left; cursor: pointer }
  small { display: block; color: #555 }
</style>
<p class="loud"><strong>Development only.</strong> This is the token broker's built-in identity provider.
Whoever reaches this page can log in as anybody.</p>
{{if .ID}}<h1>Who are you?</h1>
{{with .Wrong}}<p role="alert">{{.}}</p>
{{end}}<form method="post" action="/login">
  <input type="hidden" name="id" value="{{.ID}}">
{{range .Users}}  <button name="username" value="{{.Name}}">{{.Name}}
    <small>roles: {{range $i, $r := .Roles}}{{if $i}}, {{end}}{{$r}}{{else}}none{{end}} · groups: {{range $i, $g := .Groups}}{{if $i}}, {{end}}{{$g}}{{else}}none{{end}}</small></button>
{{end}}</form>
{{else}}<h1>Nothing to do here</h1>
<p>Go back to the application and log in from there.</p>
{{end}}</html>
`))

// login shows the page, and on POST completes the login of the user that was
// clicked.
func (s *Server) login(w http.ResponseWriter, r *http.Request) {
	id := r.FormValue("id")
	wrong := ""
	if r.Method == http.MethodPost {
		if wrong = s.store.complete(id, r.PostFormValue("username")); wrong == "" {
			http.Redirect(w, r, "/authorize/callback?id="+url.QueryEscape(id), http.StatusSeeOther)
			return
		}
	}
	s.show(w, id, wrong)
}

func (s *Server) notice(w http.ResponseWriter) { s.show(w, "", "") }

func (s *Server) show(w http.ResponseWriter, id, wrong string) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
	w.Header().Set("Cache-Control", "no-store")
	if wrong != "" {
		w.WriteHeader(http.StatusBadRequest)
	}
	page.Execute(w, map[string]any{"ID": id, "Wrong": wrong, "Users": s.store.people()})
}
