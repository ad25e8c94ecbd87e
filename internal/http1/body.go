package http1

import (
	"context"
	"fmt"
	"io"
	"net/http"
)

// Read implements io.Reader: it reads the answer's body. The end comes with the last bytes.
func (e *exchange) Read(p []byte) (int, error) {
	e.mu.Lock()
	switch {
	case e.closed:
		e.mu.Unlock()
		return 0, errReadClosed
	case e.err != nil:
		e.mu.Unlock()
		return 0, e.err
	case len(p) == 0:
		e.mu.Unlock()
		return 0, nil
	}
	e.reading = true
	e.mu.Unlock()

	n, err := e.read(p)
	clean := err == io.EOF && (e.landed || e.settle())
	if err != nil && err != io.EOF && e.ctx.Err() != nil {
		err = context.Cause(e.ctx)
	}

	e.mu.Lock()
	defer e.mu.Unlock()
	e.reading = false
	if err == nil && e.closed {
		err = errReadClosed // meanwhile
	}
	if e.err = err; err == nil {
		return n, nil
	}
	if !e.landed {
		e.finish(clean && !e.closed)
	}
	e.freeReader()
	return n, err
}

// read reads without a look at what else is going on.
func (e *exchange) read(p []byte) (n int, err error) {
	switch e.kind {
	case bodyLength:
		if int64(len(p)) > e.left {
			p = p[:e.left]
		}
		n, err = e.br.Read(p)
		e.left -= int64(n)
		switch {
		case e.left == 0:
			err = io.EOF
		case err == io.EOF:
			err = io.ErrUnexpectedEOF
		}
	case bodyChunked:
		n, err = e.chunked.Read(p)
		if err == io.EOF {
			if bad := readTrailer(&e.res, e.br); bad != nil {
				err = bad
			}
		}
	default:
		n, err = e.br.Read(p)
	}
	return n, err
}

// Close implements io.Closer. A body that was not read to its end takes the connection with it.
func (e *exchange) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil
	}
	e.closed = true
	switch {
	case e.err != nil: // all is done
	case e.reading:
		if !e.landed {
			e.conn.close() // which ends the Read
		}
	default:
		if !e.landed {
			e.finish(false)
		}
		e.freeReader()
	}
	return nil
}

// upgraded is the body of an answer with status 101: the connection, beginning with what came along with the answer.
type upgraded struct{ e *exchange }

func (u *upgraded) Read(p []byte) (int, error) {
	// net/http's users read in one goroutine at a time, and so the reader needs no lock. It stays until the end.
	if u.e.br.Buffered() > 0 {
		return u.e.br.Read(p)
	}
	return u.e.conn.nc.Read(p)
}

func (u *upgraded) Write(p []byte) (int, error) { return u.e.conn.nc.Write(p) }

// CloseWrite ends one direction, where the connection can.
func (u *upgraded) CloseWrite() error {
	if half, ok := u.e.conn.nc.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return fmt.Errorf("CloseWrite: %w", http.ErrNotSupported)
}

func (u *upgraded) Close() error {
	e := u.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.closed {
		e.closed = true
		e.finish(false)
	}
	return nil
}

var (
	_ io.ReadCloser      = (*exchange)(nil)
	_ io.ReadWriteCloser = (*upgraded)(nil)
)
