package wxsim

// ConfirmFile is the verification file that the API gives for a web-view domain (业务域名): that of a platform, or of an
// account. It never changes.
func ConfirmFile(appID string) (name, content string) {
	sum := signSorted(appID)
	return sum[:10] + ".txt", sum[:32]
}

// platformConfirmFile hands out the file of the platform whose token the call has.
func (c *call) platformConfirmFile() answer { return c.confirmFile(c.cred.platform) }

// accountConfirmFile hands out the file of the account whose token the call has.
func (c *call) accountConfirmFile() answer { return c.confirmFile(c.cred.appID) }

func (c *call) confirmFile(appID string) answer {
	name, content := ConfirmFile(appID)
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "file_name": name, "file_content": content})
}
