package main

import (
	"bytes"
	"context"
	"fmt"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

const everything = "./..."

// findModules returns the folders below root that hold a go.mod, root first. The tools module is left
// out: it only pins programs. So is what the go command itself does not look into.
func findModules(root string) ([]string, error) {
	var modules []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			hidden := path != root && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_"))
			if hidden || name == "testdata" || name == "node_modules" || path == filepath.Join(root, "tools") {
				return fs.SkipDir
			}
			return nil
		}
		if d.Name() == "go.mod" {
			modules = append(modules, filepath.Dir(path))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for modules: %w", err)
	}
	// WalkDir meets a folder's files in lexical order, so a nested module may come first.
	slices.SortFunc(modules, func(a, b string) int { return strings.Compare(filepath.Clean(a), filepath.Clean(b)) })
	if len(modules) == 0 {
		return nil, fmt.Errorf("no go.mod below %s", root)
	}
	return modules, nil
}

// packageDirs returns the folders of the packages that the patterns name in module.
func packageDirs(ctx context.Context, module string, patterns []string) ([]string, error) {
	cmd := exec.CommandContext(ctx, "go", append([]string{"list", "-e", "-find", "-f", "{{.Dir}}"}, patterns...)...)
	var stderr bytes.Buffer
	cmd.Dir, cmd.Stderr = module, &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	base, err := filepath.Abs(module)
	if err != nil {
		return nil, err
	}
	if base, err = filepath.EvalSymlinks(base); err != nil {
		return nil, err
	}
	var dirs []string
	for line := range strings.Lines(string(out)) {
		dir := strings.TrimSpace(line)
		if dir == "" {
			continue
		}
		if dir, err = filepath.EvalSymlinks(dir); err != nil {
			return nil, err
		}
		rel, err := filepath.Rel(base, dir)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, filepath.Join(module, rel))
	}
	return dirs, nil
}

// testsOnlyWith returns the tests in those test files of dir that the build tags with compile and the
// build tags without do not, sorted.
func testsOnlyWith(dir string, with, without []string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	in, out := build.Default, build.Default
	in.BuildTags, out.BuildTags = with, without
	// The race detector needs cgo, whatever CGO_ENABLED says; a file that depends on cgo is not what is asked for.
	in.CgoEnabled, out.CgoEnabled = true, true
	var names []string
	for _, e := range entries {
		if e.IsDir() || !strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		yes, err := in.MatchFile(dir, e.Name())
		if err != nil {
			return nil, err
		}
		no, err := out.MatchFile(dir, e.Name())
		if err != nil {
			return nil, err
		}
		if !yes || no {
			continue
		}
		found, err := testNames(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		names = append(names, found...)
	}
	slices.Sort(names)
	return names, nil
}

func testNames(path string) ([]string, error) {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Test") && f.Name.Name != "TestMain" {
			names = append(names, f.Name.Name)
		}
	}
	return names, nil
}
