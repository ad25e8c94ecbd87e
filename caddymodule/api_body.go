package caddymodule

import (
	"errors"
	"io"
	"sync"
)

// keptBody is the body of a call that may have to be sent twice. It streams: what has been read for the first sending
// is kept, up to a limit, and a second sending begins with that and goes on with the rest. A body larger than the
// limit is not kept and can be sent once.
type keptBody struct {
	limit int64
	size  int64 // as announced; -1 if it was not

	mu   sync.Mutex // held during a read of src, so that no byte is lost between two senders
	src  io.Reader
	kept []byte
	read int64 // bytes taken from src
	end  error // what src ended with: io.EOF when it was complete; nil while it goes on
	lost bool  // kept is not all that was read
}

// firstKept bounds what is set aside for a body on the strength of its Content-Length alone, in bytes.
const firstKept = 64 << 10

var (
	errBodyClosed  = errors.New("request body is closed")
	errBodyNotKept = errors.New("request body was not kept for a repetition")
)

// newKeptBody keeps up to limit bytes of src, whose size is known, or -1.
func newKeptBody(src io.Reader, size, limit int64) *keptBody {
	b := &keptBody{src: src, limit: limit, size: size, lost: size > limit}
	if !b.lost && size > 0 {
		b.kept = make([]byte, 0, min(size, firstKept))
	}
	return b
}

// measure reads a body of unknown size, as far as it may be kept, and returns its size, or -1 if it is longer or
// broke off. WeChat wants a length: it is said to refuse chunked uploads.
func (b *keptBody) measure() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	buf := make([]byte, 4<<10)
	for b.end == nil && !b.lost {
		b.take(buf[:min(int64(len(buf)), b.limit-int64(len(b.kept))+1)])
	}
	if b.end == io.EOF && !b.lost { // over HTTP/3 the end comes with the last bytes
		return b.read
	}
	return -1
}

// take reads from src into p and keeps what it read. The caller holds mu.
//
// The byte that exceeds the limit is kept as well: until somebody has read beyond the limit, nothing is lost.
func (b *keptBody) take(p []byte) int {
	n, err := b.src.Read(p)
	b.read += int64(n)
	if err == io.EOF && endedEarly(b.read, b.size) {
		err = io.ErrUnexpectedEOF
	}
	b.end = err
	if !b.lost {
		b.kept = append(b.kept, p[:n]...)
		b.lost = b.read > b.limit
	}
	return n
}

// repeatable reports whether the whole body can be sent again.
func (b *keptBody) repeatable() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.lost && (b.end == nil || b.end == io.EOF)
}

// failed reports whether the caller's body broke off.
func (b *keptBody) failed() bool { return b.broke() != nil }

// broke is what the caller's body broke off with, if it did.
func (b *keptBody) broke() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.end == io.EOF {
		return nil
	}
	return b.end
}

// open returns a reader from the start. An earlier reader must be closed first.
func (b *keptBody) open() *bodyReader { return &bodyReader{body: b} }

// bodyReader is one sending of a keptBody.
type bodyReader struct {
	body   *keptBody
	off    int64
	mu     sync.Mutex // guards closed; never held during a read of src, so that Close does not block
	closed bool
}

// Read implements io.Reader.
func (r *bodyReader) Read(p []byte) (int, error) {
	b := r.body
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.isClosed() {
		return 0, errBodyClosed
	}
	if r.off < int64(len(b.kept)) {
		n := copy(p, b.kept[r.off:])
		r.off += int64(n)
		if b.lost && r.off == int64(len(b.kept)) {
			b.kept = nil // it has been sent, and can never be sent again
		}
		return n, nil
	}
	if r.off != b.read {
		return 0, errBodyNotKept
	}
	if b.end != nil || len(p) == 0 {
		return 0, b.end
	}
	n := b.take(p)
	r.off += int64(n)
	if b.lost {
		b.kept = nil
	}
	return n, b.end
}

// Close implements io.Closer. A Read that is waiting for the caller goes on, and what it reads is not lost.
func (r *bodyReader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	return nil
}

func (r *bodyReader) isClosed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}
