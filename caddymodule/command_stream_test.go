package caddymodule

import (
	"fmt"
	"os"
)

// testCommand names the variable that makes the test's binary a process of one command, so that it can be sent signals.
const testCommand = "WECHAT_TEST_COMMAND"

// runTestCommand runs a command with the arguments of the process, and returns its exit code.
func runTestCommand(name string) int {
	cmd := exportCommand()
	switch name {
	case "import":
		cmd = importCommand()
	case "stuck": // waits where nothing looks at a context
		ctx, cancel := interruptible()
		defer cancel()
		fmt.Println("ready")
		<-ctx.Done()
		fmt.Println("stuck")
		select {}
	}
	cmd.SetArgs(os.Args[1:])
	if cmd.Execute() != nil { // which has said why
		return 1
	}
	return 0
}
