package main

import (
	"context"
	"fmt"
	"os"

	"github.com/fluxcd/pkg/ssa"
	ssautil "github.com/fluxcd/pkg/ssa/utils"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	group   = "kustomize.toolkit.fluxcd.io"
	manager = "kustomize-controller"
)

// fluxApply applies the manifests of stdin as kustomize-controller does for a Kustomization "runs", and prints what it did:
// created, configured, or unchanged where it saw no drift.
func fluxApply(kubeconfig string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	kube, err := client.New(config, client.Options{})
	if err != nil {
		return err
	}
	objects, err := ssautil.ReadObjects(os.Stdin)
	if err != nil {
		return err
	}
	resources := ssa.NewResourceManager(kube, nil, ssa.Owner{Field: manager, Group: group})
	resources.SetOwnerLabels(objects, "runs", "flux-system")
	changes, err := resources.ApplyAll(context.Background(), objects, applyOptions())
	if err != nil {
		return err
	}
	for _, change := range changes.Entries {
		fmt.Println(change.Action)
	}
	return nil
}

// applyOptions are those of kustomize-controller 1.9 (internal/controller/kustomization_controller.go, apply).
func applyOptions() ssa.ApplyOptions {
	options := ssa.DefaultApplyOptions()
	options.Cleanup = ssa.ApplyCleanupOptions{
		Annotations: []string{"kubectl.kubernetes.io/last-applied-configuration"},
		FieldManagers: []ssa.FieldManager{
			{Name: "kubectl", OperationType: metav1.ManagedFieldsOperationApply},
			{Name: "kubectl", OperationType: metav1.ManagedFieldsOperationUpdate},
			{Name: "before-first-apply", OperationType: metav1.ManagedFieldsOperationUpdate},
			{Name: manager, OperationType: metav1.ManagedFieldsOperationUpdate},
		},
		Exclusions: map[string]string{group + "/ssa": "Merge"},
	}
	return options
}
