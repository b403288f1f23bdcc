// GitOps tools without the tools: what Argo CD, kstatus and Flux make of resources (no arguments), and how Flux applies
// manifests (with a kubeconfig). Each by its own code or the interpreter that it uses.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	luajson "layeh.com/gopher-json"
)

// question is what stdin has. Expressions are named, since there are several for one kind.
type question struct {
	Health      string                                      `json:"health"`
	Expressions map[string]kustomize.HealthCheckExpressions `json:"expressions"`
	Objects     map[string]json.RawMessage                  `json:"objects"`
}

type verdict struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

// answer is what is told of one object.
type answer struct {
	Argo    verdict           `json:"argo"`
	Kstatus verdict           `json:"kstatus"`
	Flux    map[string]string `json:"flux"`
}

func main() {
	var err error
	if len(os.Args) > 1 {
		err = fluxApply(os.Args[1])
	} else {
		err = judgeAll()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func judgeAll() error {
	var asked question
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		return err
	}
	evaluators := map[string]*cel.StatusEvaluator{}
	for name, expressions := range asked.Expressions {
		evaluator, err := cel.NewStatusEvaluator(&expressions)
		if err != nil {
			return fmt.Errorf("expressions %s: %w", name, err)
		}
		evaluators[name] = evaluator
	}
	answers := map[string]answer{}
	for name, raw := range asked.Objects {
		told, err := judge(raw, asked.Health, evaluators)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		answers[name] = told
	}
	return json.NewEncoder(os.Stdout).Encode(answers)
}

func judge(raw []byte, health string, evaluators map[string]*cel.StatusEvaluator) (answer, error) {
	object := &unstructured.Unstructured{}
	// As a client reads it: whole numbers are int64, without which kstatus and Flux see no generation.
	if err := object.UnmarshalJSON(raw); err != nil {
		return answer{}, err
	}
	argo, err := argoHealth(raw, health)
	if err != nil {
		return answer{}, err
	}
	computed, err := status.Compute(object)
	if err != nil {
		return answer{}, err
	}
	flux := map[string]string{}
	for name, evaluator := range evaluators {
		result, err := evaluator.Evaluate(context.Background(), object)
		if err != nil {
			// As it is where a field is missing: Flux tells the error, and waits on.
			flux[name] = "error: " + err.Error()
			continue
		}
		flux[name] = result.Status.String()
	}
	return answer{Argo: argo, Kstatus: verdict{computed.Status.String(), computed.Message}, Flux: flux}, nil
}

// argoHealth runs the script as Argo CD does (util/lua/lua.go): only libraries package, base and table are open, for one second.
func argoHealth(raw []byte, script string) (verdict, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	libraries := map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable,
	}
	for _, name := range []string{lua.LoadLibName, lua.BaseLibName, lua.TabLibName} {
		open := lua.P{Fn: state.NewFunction(libraries[name]), NRet: 0, Protect: true}
		if err := state.CallByParam(open, lua.LString(name)); err != nil {
			return verdict{}, err
		}
	}
	context, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	state.SetContext(context)
	object, err := luajson.Decode(state, raw)
	if err != nil {
		return verdict{}, err
	}
	state.SetGlobal("obj", object)
	if err := state.DoString(script); err != nil {
		return verdict{}, err
	}
	encoded, err := luajson.Encode(state.Get(-1))
	if err != nil {
		return verdict{}, err
	}
	var told verdict
	return told, json.Unmarshal(encoded, &told)
}
