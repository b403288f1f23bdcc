// Helm.
package main

import (
	"errors"
	"os"

	helm "helm.sh/helm/v4/pkg/cmd"
	"helm.sh/helm/v4/pkg/kube"
)

func main() {
	// Of the fields that it applies, however this program is called.
	kube.ManagedFieldsManager = "helm"
	command, err := helm.NewRootCmd(os.Stdout, os.Args[1:], helm.SetupLogging)
	if err == nil {
		err = command.Execute()
	}
	var told helm.CommandError
	switch {
	case errors.As(err, &told):
		os.Exit(told.ExitCode)
	case err != nil:
		os.Exit(1)
	}
}
