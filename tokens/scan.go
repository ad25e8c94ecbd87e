package tokens

import (
	"context"
	"errors"
	"path"
	"slices"
	"strings"
)

// Scanner is what a Store may do beside: give the records of a folder of any size page by page. See Scan.
type Scanner interface {
	// Scan returns the names of at most n records directly in a folder, in ascending order, and the cursor of the page
	// after them; that is empty after the last one, and the first page is that of the empty cursor. Prefix is the folder
	// with a slash behind it, and then as much of the names as is asked for, which may be nothing. N is more than zero.
	//
	// A record that is there from before the first page until after the last is returned exactly once, whatever is added
	// and removed meanwhile, also when the pages come from different processes, or from a store that was restarted or
	// taken over by its replica in between: a cursor says by itself which names are still to come.
	Scan(ctx context.Context, prefix, cursor string, n int) (names []string, next string, err error)
}

// Scan is the Scan of a store that is a Scanner. Of another one it takes the page out of a whole List.
func Scan(ctx context.Context, s Store, prefix, cursor string, n int) (names []string, next string, err error) {
	if scanner, ok := s.(Scanner); ok {
		return scanner.Scan(ctx, prefix, cursor, n)
	}
	names, err = s.List(ctx, path.Dir(prefix+"x"))
	if err != nil {
		return nil, "", err
	}
	return PageOf(names, prefix, cursor, n)
}

var errPageSize = errors.New("a page has at least one record")

// PageOf is the page of a Scan, of the names of all records in the folder, which it sorts. It is for implementations.
func PageOf(all []string, prefix, cursor string, n int) (names []string, next string, err error) {
	if n < 1 {
		return nil, "", errPageSize
	}
	folder := strings.LastIndexByte(prefix, '/') + 1
	all = slices.DeleteFunc(all, func(name string) bool {
		return !strings.HasPrefix(name, prefix) || name[folder:] <= cursor
	})
	slices.Sort(all)
	if len(all) <= n {
		return all, "", nil
	}
	return all[:n:n], all[n-1][folder:], nil // the cursor is the last name of the page
}

// Scan implements Scanner.
func (s *MemStore) Scan(ctx context.Context, prefix, cursor string, n int) (names []string, next string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	s.mu.Lock()
	for name := range s.records {
		if below, ok := strings.CutPrefix(name, prefix); ok && !strings.Contains(below, "/") {
			names = append(names, name)
		}
	}
	s.mu.Unlock()
	return PageOf(names, prefix, cursor, n)
}

var _ Scanner = (*MemStore)(nil)
