// The parts of Kubernetes that the tests run, in one binary: `kubernetes COMPONENT [FLAGS]`.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
)

// A command is made only when it is asked for: each sets up the signal handler of the process, which panics at the second time.
var components = map[string]func() *cobra.Command{}

func main() {
	if len(os.Args) < 2 || components[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "this binary was built with:")
		for name := range components {
			fmt.Fprintln(os.Stderr, " ", name)
		}
		os.Exit(2)
	}
	command := components[os.Args[1]]
	os.Args = os.Args[1:]
	os.Exit(cli.Run(command()))
}
