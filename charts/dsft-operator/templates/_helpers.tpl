{{- define "dsft.name" -}}
{{- /* The NetworkPolicy of each run lets pods of this name in. */ -}}
dsft-operator
{{- end -}}

{{- define "dsft.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "dsft.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "dsft.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "dsft.selectorLabels" -}}
app.kubernetes.io/name: {{ include "dsft.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "dsft.labels" -}}
{{ include "dsft.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: dsft
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "dsft.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "dsft.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name: name the ServiceAccount to use, or set serviceAccount.create" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "dsft.image" -}}
{{- $repository := required "image.repository: name the operator's image, such as registry.example.com/dsft-operator" .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* The OperatorConfig of the ConfigMap. Its namespace is the release's, by POD_NAMESPACE. */ -}}
{{- define "dsft.config" -}}
apiVersion: config.dsft.dev/v1alpha1
kind: OperatorConfig
{{- /* A Lease of the release's own: two releases in one namespace are no replicas of each other. */ -}}
{{- $lease := dict "leaderElection" (dict "leaseName" (include "dsft.leaseName" .)) }}
{{ merge (deepCopy .Values.config) $lease | toYaml }}
{{- end -}}

{{- define "dsft.rootKeySecret" -}}
{{- default "dsft-root-key" .Values.config.rootKeySecret -}}
{{- end -}}

{{- define "dsft.httpPort" -}}
{{- default 8080 .Values.config.httpPort -}}
{{- end -}}

{{- define "dsft.leaseName" -}}
{{- dig "leaderElection" "leaseName" (include "dsft.fullname" .) .Values.config -}}
{{- end -}}

{{- /* Not empty if it does. `dig` takes false for absent. */ -}}
{{- define "dsft.electsLeader" -}}
{{- $election := default dict .Values.config.leaderElection -}}
{{- if or (not (hasKey $election "enabled")) $election.enabled }}yes{{ end -}}
{{- end -}}
