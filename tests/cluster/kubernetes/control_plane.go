package main

import (
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

func init() {
	components["kube-apiserver"] = apiserver.NewAPIServerCommand
	components["kube-controller-manager"] = controllermanager.NewControllerManagerCommand
}
