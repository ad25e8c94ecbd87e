package main

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	_ "github.com/caddy-wechat/caddy-wechat"
)

// The tests in this file hold xcaddy.json true: against go.mod, and against what importing this
// repository's root package, as a build by xcaddy does, registers with Caddy.

const caddyModule = "github.com/caddyserver/caddy/v2"

// goMod is what `go mod edit -json` prints of a go.mod.
type goMod struct {
	Module  moduleVersion
	Require []moduleVersion
	Replace []struct{ Old, New moduleVersion }
}

type moduleVersion struct{ Path, Version string }

func (m moduleVersion) String() string { return strings.TrimSuffix(m.Path+"@"+m.Version, "@") }

func TestVersionsAreThoseOfGoMod(t *testing.T) {
	t.Parallel()
	root, mod := repository(t)
	s := readOurs(t, root)
	if got := s.Plugins[0].ModulePath; got != mod.Module.Path {
		t.Errorf("plugins[0].module_path is %q, go.mod says %q", got, mod.Module.Path)
	}
	i := slices.IndexFunc(mod.Require, func(m moduleVersion) bool { return m.Path == caddyModule })
	if i < 0 {
		t.Fatalf("go.mod does not require %s", caddyModule)
	}
	if got, want := s.CaddyVersion, mod.Require[i].Version; got != want {
		t.Errorf("caddy_version is %q, go.mod requires %q", got, want)
	}
}

// A build by xcaddy does not see our go.mod's replacements: with one, users would get another program
// than we test, unless xcaddy.json asks for the same.
func TestReplacementsAreThoseOfGoMod(t *testing.T) {
	t.Parallel()
	root, mod := repository(t)
	var want []replacement
	for _, r := range mod.Replace {
		want = append(want, replacement{Old: r.Old.String(), New: r.New.String()})
	}
	if got := readOurs(t, root).Replacements; !slices.Equal(got, want) {
		t.Errorf("replacements are %v, go.mod has %v", got, want)
	}
}

func TestModulesAreThoseRegistered(t *testing.T) {
	t.Parallel()
	root, mod := repository(t)
	var registered []string
	for _, id := range caddy.Modules() {
		info, err := caddy.GetModule(id)
		if err != nil {
			t.Fatal(err)
		}
		typ := reflect.TypeOf(info.New())
		if typ.Kind() == reflect.Pointer {
			typ = typ.Elem()
		}
		if typ.PkgPath() == mod.Module.Path || strings.HasPrefix(typ.PkgPath(), mod.Module.Path+"/") {
			registered = append(registered, id)
		}
	}
	compareNames(t, "modules", readOurs(t, root).Modules, registered)
}

func TestDirectivesAndOptionsAreThoseRegistered(t *testing.T) {
	t.Parallel()
	root, _ := repository(t)
	s := readOurs(t, root)
	var directives, options []string
	for _, name := range candidates(t, root, s) {
		if known(t, "http://:8080 {\n\troute {\n\t\t"+name+"\n\t}\n}\n", "unrecognized directive: "+name) {
			directives = append(directives, name)
		}
		if known(t, "{\n\t"+name+"\n}\n", "unrecognized global option: "+name) {
			options = append(options, name)
		}
	}
	compareNames(t, "directives", s.Directives, directives)
	compareNames(t, "global_options", s.GlobalOptions, options)
}

// known adapts a Caddyfile and reports whether the adapter knows the name in it: any other complaint
// comes from the name's own parser.
func known(t *testing.T, caddyfile, unknown string) bool {
	t.Helper()
	_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	if err == nil {
		return true
	}
	return !regexp.MustCompile(regexp.QuoteMeta(unknown) + `(\s|$)`).MatchString(err.Error())
}

// candidates are the names that may be directives or global options of ours: those in xcaddy.json, and,
// since Caddy does not list what is registered, each string in package caddymodule that could be one.
func candidates(t *testing.T, root string, s spec) []string {
	t.Helper()
	names := slices.Concat(s.Directives, s.GlobalOptions)
	shape := regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	files, err := filepath.Glob(filepath.Join(root, "caddymodule", "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				return true
			}
			if text, err := strconv.Unquote(lit.Value); err == nil && strings.HasPrefix(text, "wechat") && shape.MatchString(text) {
				names = append(names, text)
			}
			return true
		})
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func compareNames(t *testing.T, field string, written, registered []string) {
	t.Helper()
	for _, name := range written {
		if !slices.Contains(registered, name) {
			t.Errorf("%s: %q is in xcaddy.json, but not registered", field, name)
		}
	}
	for _, name := range registered {
		if !slices.Contains(written, name) {
			t.Errorf("%s: %q is registered, but not in xcaddy.json", field, name)
		}
	}
	if sorted := slices.Compact(slices.Sorted(slices.Values(written))); len(sorted) != len(written) {
		t.Errorf("%s: a name is there twice: %q", field, written)
	}
}

func readOurs(t *testing.T, root string) spec {
	t.Helper()
	s, err := readSpec(filepath.Join(root, "xcaddy.json"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// repository returns the repository's root and what its go.mod says.
func repository(t *testing.T) (string, goMod) {
	t.Helper()
	path := strings.TrimSpace(goOutput(t, "env", "GOMOD"))
	var mod goMod
	if err := json.Unmarshal([]byte(goOutput(t, "mod", "edit", "-json", path)), &mod); err != nil {
		t.Fatal(fmt.Errorf("%s: %w", path, err))
	}
	return filepath.Dir(path), mod
}

func goOutput(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", args...).Output()
	if err != nil {
		t.Fatalf("go %s: %v", strings.Join(args, " "), err)
	}
	return string(out)
}
