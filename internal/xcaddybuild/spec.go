package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
)

// spec is xcaddy.json. Its first three fields have the names and the meaning that they have in
// xcaddy's own Builder, whose JSON decoder passes over the others.
type spec struct {
	CaddyVersion string        `json:"caddy_version"`
	Plugins      []plugin      `json:"plugins"`
	Replacements []replacement `json:"replacements,omitempty"`

	// What a build with the plugins has that stock Caddy does not have.
	Modules       []string `json:"modules"`        // module ids, sorted
	Directives    []string `json:"directives"`     // in the order in which Caddy sorts them
	GlobalOptions []string `json:"global_options"` // names of global options
}

type plugin struct {
	ModulePath string `json:"module_path"`
	Version    string `json:"version,omitempty"`
}

type replacement struct {
	Old string `json:"old"`
	New string `json:"new"`
}

// readSpec reads and checks xcaddy.json. An unknown field is an error: it is either a misspelling or
// a field that nothing holds true.
func readSpec(path string) (spec, error) {
	var s spec
	text, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	if d.More() {
		return s, fmt.Errorf("%s: more than one JSON value", path)
	}
	return s, s.validate()
}

func (s spec) validate() error {
	switch {
	case !strings.HasPrefix(s.CaddyVersion, "v"):
		return fmt.Errorf("caddy_version %q: want a release such as v2.0.0", s.CaddyVersion)
	case len(s.Plugins) == 0 || s.Plugins[0].ModulePath == "":
		return errors.New("plugins: want the module path of this repository first")
	case len(s.Modules) == 0:
		return errors.New("modules: want the ids of the modules that the plugins add")
	}
	return nil
}

// buildArgs are the arguments of `xcaddy` that build the spec into output. The first plugin is this
// repository and is taken from checkout, for a build of what is here and not of what is published.
func (s spec) buildArgs(checkout, output string) []string {
	args := []string{"build", s.CaddyVersion, "--output", output}
	for i, p := range s.Plugins {
		with := p.ModulePath
		if p.Version != "" {
			with += "@" + p.Version
		}
		if i == 0 {
			with = p.ModulePath + "=" + checkout
		}
		args = append(args, "--with", with)
	}
	for _, r := range s.Replacements {
		args = append(args, "--replace", r.Old+"="+r.New)
	}
	return args
}

// proxiesThenOff turns a GOPROXY list into one that asks the proxies and then gives up. The go command looks
// for the module's versions although a local replacement stands in for it, and accepts being told "off".
// "direct" would go on to ask the module's host, which may be out of reach; and "|" goes on after any error,
// for a proxy may answer for a module that is not published with something else than "not found".
func proxiesThenOff(goproxy string) string {
	var b strings.Builder
	separator := ""
	for rest := strings.TrimSpace(goproxy); rest != ""; {
		entry, next := rest, ""
		if i := strings.IndexAny(rest, ",|"); i >= 0 {
			entry, next, rest = rest[:i], rest[i:i+1], rest[i+1:]
		} else {
			rest = ""
		}
		entry = strings.TrimSpace(entry)
		if entry != "" && entry != "direct" && entry != "off" {
			b.WriteString(separator + entry)
			separator = next
		}
	}
	if b.Len() == 0 {
		return "off"
	}
	return b.String() + "|off"
}

// missingModules returns those of want that the output of `caddy list-modules` does not list.
func missingModules(listing string, want []string) []string {
	listed := map[string]bool{}
	for line := range strings.Lines(listing) {
		listed[strings.TrimSpace(line)] = true
	}
	var missing []string
	for _, id := range want {
		if !listed[id] {
			missing = append(missing, id)
		}
	}
	return missing
}
