package wxsim

import "slices"

// codeSet is the permission set of mini program development, which takes in the web-view domain.
const codeSet = 18

// ConfirmFile is the verification file that the API gives for a web-view domain (业务域名): that of a platform, or of an
// account. It never changes.
func ConfirmFile(appID string) (name, content string) {
	sum := signSorted(appID)
	return sum[:10] + ".txt", sum[:32]
}

// platformConfirmFile hands out the file of the platform whose token the call has.
func (c *call) platformConfirmFile() answer { return c.confirmFile(c.cred.platform) }

// accountConfirmFile hands out the file of the account whose token the call has, if it granted what that takes.
func (c *call) accountConfirmFile() answer {
	if c.cred.kind == KindAuthorizer {
		auth := c.s.authorizations[pair{c.cred.platform, c.cred.appID}]
		if !auth.live() || !slices.Contains(auth.sets, codeSet) {
			return c.fail(61007)
		}
	}
	return c.confirmFile(c.cred.appID)
}

func (c *call) confirmFile(appID string) answer {
	name, content := ConfirmFile(appID)
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "file_name": name, "file_content": content})
}
