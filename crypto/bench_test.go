package crypto

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"testing"
)

// The targets, ns/op on one core with AES-NI for messages of 512 B, 1 KB and 4 KB, all without allocation; those of open
// and seal are the sums of their unit costs:
//
//	whole job   2604   3672   10234   scan and open a push, seal a reply of 320 B
//	scan          54     62     112   envelope; validates every byte, which the figures do not have in them
//	signature    520    896    3050
//	open        1311   2386    8776   signature, base64, AES
//	seal        1658   3077   11421   AES, base64, signature

var benchSizes = []int{512, 1024, 4096}

const benchReplySize = 320

// benchPush is a push to open, with what a handler would have at hand.
type benchPush struct {
	codec   *Codec
	params  Params
	body    []byte
	encrypt []byte
	message []byte
	reply   []byte
}

// benchMessage makes a text message of a size.
func benchMessage(size int) []byte {
	head := "<xml><ToUserName><![CDATA[gh_97417a04a28d]]></ToUserName>\n<FromUserName><![CDATA[o9AgO5Kd5ggOC-bXrbNODIiE3bGY]]></FromUserName>\n" +
		"<CreateTime>1715943329</CreateTime>\n<MsgType><![CDATA[text]]></MsgType>\n<Content><![CDATA["
	tail := "]]></Content>\n<MsgId>6054768590064713728</MsgId>\n</xml>"
	content := bytes.Repeat([]byte("你好 hello "), size)[:size-len(head)-len(tail)]
	content = bytes.ToValidUTF8(content, nil)
	content = append(content, bytes.Repeat([]byte("."), size-len(head)-len(tail)-len(content))...)
	return append(append([]byte(head), content...), tail...)
}

func newBenchPush(tb testing.TB, size int) benchPush {
	tb.Helper()
	p := benchPush{
		codec:   mustCodec(tb, appid, []string{"AAAAA"}, []string{keyA}),
		message: benchMessage(size),
		reply:   benchMessage(benchReplySize),
	}
	if len(p.message) != size {
		tb.Fatalf("message of %d bytes, want %d", len(p.message), size)
	}
	var err error
	p.params = Params{Timestamp: "1715943329", Nonce: "1590219412"}
	p.body, p.params.MsgSignature, err = p.codec.SealPush(new(Buffers), FormatXML, "ToUserName", "gh_97417a04a28d", 1715943329, p.params.Nonce, p.message)
	if err != nil {
		tb.Fatal(err)
	}
	env, err := ScanEnvelope(p.body)
	if err != nil {
		tb.Fatal(err)
	}
	p.encrypt = env.Encrypt
	return p
}

// wholeJob is what a push costs: envelope, signature, opening, and a sealed reply.
func (p *benchPush) wholeJob(tb testing.TB, b *Buffers, dst []byte) []byte {
	env, err := ScanEnvelope(p.body)
	if err != nil {
		tb.Fatal(err)
	}
	o, err := p.codec.Open(b, p.params, env.Encrypt)
	if err != nil {
		tb.Fatal(err)
	}
	dst, err = p.codec.AppendReply(dst[:0], b, o, env.Format, 1715943330, p.params.Nonce, p.reply)
	if err != nil {
		tb.Fatal(err)
	}
	return dst
}

func benchEach(b *testing.B, run func(b *testing.B, p *benchPush)) {
	b.Helper()
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			p := newBenchPush(b, size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			run(b, &p)
		})
	}
}

func BenchmarkWholeJob(b *testing.B) {
	benchEach(b, func(b *testing.B, p *benchPush) {
		var buf Buffers
		dst := p.wholeJob(b, &buf, nil)
		for b.Loop() {
			dst = p.wholeJob(b, &buf, dst)
		}
	})
}

func BenchmarkScanEnvelope(b *testing.B) {
	benchEach(b, func(b *testing.B, p *benchPush) {
		for b.Loop() {
			if _, err := ScanEnvelope(p.body); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkScanFields(b *testing.B) {
	benchEach(b, func(b *testing.B, p *benchPush) {
		var f Fields
		for b.Loop() {
			if err := ScanFields(p.message, &f); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSignature(b *testing.B) {
	benchEach(b, func(b *testing.B, p *benchPush) {
		want, _ := parseSignature(p.params.MsgSignature)
		var join []byte
		for b.Loop() {
			var ok bool
			if join, _, ok = matchToken(join, p.codec.tokens, want, p.params.Timestamp, p.params.Nonce, p.encrypt); !ok {
				b.Fatal("no match")
			}
		}
	})
}

func BenchmarkOpen(b *testing.B) {
	benchEach(b, func(b *testing.B, p *benchPush) {
		var buf Buffers
		for b.Loop() {
			if _, err := p.codec.Open(&buf, p.params, p.encrypt); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	benchEach(b, func(b *testing.B, p *benchPush) {
		var buf Buffers
		var dst []byte
		for b.Loop() {
			var err error
			if dst, err = p.codec.AppendReply(dst[:0], &buf, Opened{}, FormatXML, 1715943330, p.params.Nonce, p.message); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkFloor is the standard library alone on the bytes of the whole job: what it must cost on the machine at hand.
func BenchmarkFloor(b *testing.B) {
	benchEach(b, func(b *testing.B, p *benchPush) {
		k := p.codec.keys[0].s
		text, err := base64.StdEncoding.DecodeString(string(p.encrypt))
		if err != nil {
			b.Fatal(err)
		}
		plain := make([]byte, len(text))
		reply := make([]byte, 384)
		encoded := make([]byte, 512)
		for b.Loop() {
			sha1.Sum(p.encrypt)
			_, _ = base64.StdEncoding.Decode(text, p.encrypt)
			k.decrypt(plain, text)
			newRandom()
			k.encrypt(reply)
			base64.StdEncoding.Encode(encoded, reply)
			sha1.Sum(encoded)
		}
	})
}
