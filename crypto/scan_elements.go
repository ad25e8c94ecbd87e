package crypto

import "strings"

// ScanElements reads a message of format f, as strictly as ScanFields and without control characters, for what lies
// below its top level. A path names an element by the names from the top level down to it, such as "MsgType" or "Image/MediaId"; no path leads through another. The values
// come in the order of the paths, as ScanFields gives them: nil when the element is absent, aliasing the message unless they
// had to be unescaped. A value within its element, and anything at the top level, stands there once; of the elements
// around a value that repeat below the top level, as the articles of a news do, the first counts. In JSON a repeated
// element is an array. Other elements are checked for form and skipped. The error is ErrEnvelope.
func ScanElements(message []byte, f Format, paths ...string) ([]Text, error) {
	r := elementReader{scanner: scanner{src: message}, values: make([]Text, len(paths))}
	if err := r.begin(); err != nil {
		return nil, err
	}
	if r.format != f {
		return nil, errFormat
	}
	top := newLevel(paths)
	for {
		more, err := r.next()
		if err == nil && more {
			err = r.element(top, 1)
		}
		if err != nil {
			return nil, err
		}
		if !more {
			return r.values, nil
		}
	}
}

// elementReader reads the values of one ScanElements.
type elementReader struct {
	scanner
	values []Text // by path
}

// level is one element, or the top level, while what is in it is read.
type level struct {
	paths []string // the part of each path from here on, "" for those that lead elsewhere
	met   []bool   // by path: its first name was met at this level
}

func newLevel(paths []string) *level { return &level{paths, make([]bool, len(paths))} }

// find returns the first path that goes on with a name, and whether it ends there; -1 if none does.
func (l *level) find(name []byte) (path int, ends bool) {
	for i, p := range l.paths {
		if first, _, goesOn := strings.Cut(p, "/"); p != "" && first == string(name) {
			return i, !goesOn
		}
	}
	return -1, false
}

// below is the level of an element in this one.
func (l *level) below(name []byte) *level {
	rest := make([]string, len(l.paths))
	for i, p := range l.paths {
		if first, tail, _ := strings.Cut(p, "/"); first == string(name) {
			rest[i] = tail
		}
	}
	return newLevel(rest)
}

// element reads the element whose name was found last; depth is how many lie around what is in it.
func (r *elementReader) element(l *level, depth int) error {
	path, ends := l.find(r.name)
	switch {
	case path < 0, l.met[path] && !ends && depth > 1:
		return r.skip(depth)
	case l.met[path]:
		return errDuplicate
	}
	l.met[path] = true
	if ends {
		value, err := r.value()
		r.values[path] = value
		return err
	}
	if r.format == FormatJSON {
		return r.withinJSON(l.below(r.name), depth)
	}
	return r.withinXML(l.below(r.name), depth)
}

func (r *elementReader) withinXML(l *level, depth int) error {
	if r.closed {
		return nil
	}
	parent := r.name
	for {
		more, err := r.memberXML(parent)
		if err != nil || !more {
			return err
		}
		if err := r.element(l, depth+1); err != nil {
			return err
		}
	}
}

// withinJSON reads an object, or an array, of which the first item counts; null is an element with nothing in it.
func (r *elementReader) withinJSON(l *level, depth int) error {
	if depth > maxDepth {
		return errDeep
	}
	switch r.peek() {
	case '{':
		return r.withinObject(l, depth)
	case '[':
		return r.withinArray(l, depth)
	case 'n':
		return r.scalarJSON()
	}
	return errNestedText
}

func (r *elementReader) withinObject(l *level, depth int) error {
	r.pos++
	for first := true; ; first = false {
		name, more, err := r.memberJSON(first)
		if err != nil || !more {
			return err
		}
		r.name = name
		if err := r.element(l, depth+1); err != nil {
			return err
		}
	}
}

func (r *elementReader) withinArray(l *level, depth int) error {
	r.pos++
	for first := true; ; first = false {
		more, err := r.itemJSON(first)
		switch {
		case err != nil || !more:
			return err
		case first:
			err = r.withinJSON(l, depth+1)
		default:
			err = r.skipJSON(depth + 1)
		}
		if err != nil {
			return err
		}
	}
}
