package caddymodule

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// What export writes and import reads may be a pipe whose other end does nothing, or that nobody has opened there. Nothing
// interrupts such a system call on a file that others share, so that each is waited for until the command is to end.

const (
	// streamBuffer is what is read from, or written into, a stream at a time: twice what a pipe holds.
	streamBuffer = 1 << 17
	// maxSymlinks bounds the symbolic links on the way to a file that is not there yet, as the kernel does for one that is.
	maxSymlinks = 40
)

// await is work, or the end of ctx if that comes first. Work that is under way then ends with the process.
func await[T any](ctx context.Context, work func() (T, error)) (T, error) {
	type result struct {
		is  T
		err error
	}
	if ctx.Err() != nil {
		return *new(T), context.Cause(ctx)
	}
	done := make(chan result, 1)
	go func() {
		is, err := work()
		done <- result{is, err}
	}()
	select {
	case r := <-done:
		return r.is, r.err
	case <-ctx.Done():
		return *new(T), context.Cause(ctx)
	}
}

// stallingReader reads from what may stall. It is of no use once ctx has ended.
type stallingReader struct {
	ctx context.Context //nolint:containedctx // io.Reader takes none
	r   io.Reader
	buf [streamBuffer]byte // p is the caller's again when Read returns
}

// Read implements io.Reader.
func (s *stallingReader) Read(p []byte) (int, error) {
	b := s.buf[:min(len(p), len(s.buf))]
	n, err := await(s.ctx, func() (int, error) { return s.r.Read(b) })
	return copy(p, b[:n]), err
}

// stallingWriter writes into what may stall. It is of no use once ctx has ended.
type stallingWriter struct {
	ctx context.Context //nolint:containedctx // io.Writer takes none
	w   io.Writer
	buf []byte // p is the caller's again when Write returns
}

// Write implements io.Writer.
func (s *stallingWriter) Write(p []byte) (int, error) {
	s.buf = append(s.buf[:0], p...)
	return await(s.ctx, func() (int, error) { return s.w.Write(s.buf) })
}

// stalls reports whether a stream may make who uses it wait without end.
func stalls(stream any) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err != nil || !info.Mode().IsRegular()
}

// readable is a stream as it can be read until ctx ends.
func readable(ctx context.Context, in io.Reader) io.Reader {
	if !stalls(in) {
		return in
	}
	return bufio.NewReaderSize(&stallingReader{ctx: ctx, r: in}, streamBuffer)
}

// writeStream writes into a stream until ctx ends.
func writeStream(ctx context.Context, out io.Writer, write func(io.Writer) error) error {
	if isTerminal(out) {
		return errTerminal
	}
	if stalls(out) {
		out = &stallingWriter{ctx: ctx, w: out}
	}
	w := bufio.NewWriterSize(out, streamBuffer)
	if err := write(w); err != nil {
		return err
	}
	return w.Flush()
}

var errTerminal = errors.New("the archive is not text: name a file for it, or direct it somewhere")

// writeTo writes to what a file name says, as a shell's redirection would: out for - or another name of it, into a pipe or
// a device as it comes, and elsewhere, behind symbolic links, a file that is there whole or not at all.
func writeTo(ctx context.Context, file string, out io.Writer, write func(io.Writer) error) error {
	if file == "-" {
		return writeStream(ctx, out, write)
	}
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case isFile(out, info):
		return writeStream(ctx, out, write)
	case info.Mode()&(fs.ModeNamedPipe|fs.ModeCharDevice) != 0:
		f, err := await(ctx, func() (*os.File, error) { return os.OpenFile(file, os.O_WRONLY, 0) })
		if err != nil {
			return err
		}
		err = writeStream(ctx, f, write)
		return errors.Join(err, f.Close())
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s: an archive cannot be written there: it is neither a file, nor a pipe or character device (%s)", file, info.Mode())
	}
	if file, err = linkTarget(file); err != nil {
		return err
	}
	return writeWhole(file, write)
}

// isFile reports whether a stream is the file of info.
func isFile(stream any, info fs.FileInfo) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	own, err := f.Stat()
	return err == nil && os.SameFile(own, info)
}

// linkTarget follows the symbolic links at the end of a file's name. What they lead to need not be there.
func linkTarget(file string) (string, error) {
	name := file
	for range maxSymlinks {
		folder, base := filepath.Split(name)
		if folder == "" {
			folder = "."
		}
		folder, err := filepath.EvalSymlinks(folder)
		if err != nil {
			return "", err
		}
		name = filepath.Join(folder, base)
		to, err := os.Readlink(name)
		if err != nil {
			return name, nil //nolint:nilerr // no link
		}
		if name = to; !filepath.IsAbs(to) {
			name = folder + string(filepath.Separator) + to // not cleaned: a .. in it is that of where a link leads
		}
	}
	return "", fmt.Errorf("%s: more than %d symbolic links, one behind the other", file, maxSymlinks)
}

// writeWhole writes a file that only its owner can read, and that is there whole, and stays, once nil is returned.
func writeWhole(file string, write func(io.Writer) error) (err error) {
	folder := filepath.Dir(file)
	f, err := os.CreateTemp(folder, tempPattern(file)) // with mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	w := bufio.NewWriterSize(f, streamBuffer)
	if err := write(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	d, err := os.Open(folder)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}

// tempPattern is what files are called until they are whole.
func tempPattern(file string) string { return "." + filepath.Base(file) + ".*.tmp" }
