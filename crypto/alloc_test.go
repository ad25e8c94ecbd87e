//go:build !race

package crypto

import "testing"

// TestNoAllocations is the gate behind the benchmarks. The race detector makes pools drop at random, so it runs without.
func TestNoAllocations(t *testing.T) {
	for _, size := range benchSizes {
		p := newBenchPush(t, size)
		rotated := p
		rotated.codec = mustCodec(t, appid, []string{"newer", "AAAAA"}, []string{keyB, keyA})
		forged := p.params
		forged.Nonce = "1590219413"
		jsonBody := []byte(`{"ToUserName":"gh_1","Encrypt":"` + string(p.encrypt) + `"}`)
		jsonMessage := []byte(`{"ToUserName":"gh_1","CreateTime":1714112445,"MsgType":"event","Event":"debug_demo","a":{"b":[1,"c"]}}`)
		twice := []byte("<xml><Encrypt>a</Encrypt><Encrypt>a</Encrypt></xml>")

		var b Buffers
		var f Fields
		dst := p.wholeJob(t, &b, nil)
		jobs := map[string]func(){
			"whole job":               func() { dst = p.wholeJob(t, &b, dst) },
			"whole job, old key":      func() { dst = rotated.wholeJob(t, &b, dst) },
			"envelope in JSON":        func() { _, _ = ScanEnvelope(jsonBody) },
			"fields":                  func() { _ = ScanFields(p.message, &f) },
			"fields in JSON":          func() { _ = ScanFields(jsonMessage, &f) },
			"forged push":             func() { _, _ = p.codec.Open(&b, forged, p.encrypt) },
			"malformed envelope":      func() { _, _ = ScanEnvelope(twice) },
			"reply in JSON":           func() { dst, _ = p.codec.AppendReply(dst[:0], &b, Opened{}, FormatJSON, 1715943330, "1", p.reply) },
			"verifying a signature":   func() { p.codec.VerifySignature(p.params.MsgSignature, "1715943329", "1") },
			"signature, not even hex": func() { p.codec.VerifySignature("x", "1715943329", "1") },
		}
		for name, job := range jobs {
			job()
			if n := testing.AllocsPerRun(200, job); n != 0 {
				t.Errorf("%s of %d B: %v allocations", name, size, n)
			}
		}
	}
}
