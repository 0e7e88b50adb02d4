{{- define "vllm-sparse.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 45 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 45 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "vllm-sparse.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vllm-sparse.labels" -}}
{{ include "vllm-sparse.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "vllm-sparse.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}{{ end }}
{{- end }}

{{- define "vllm-sparse.claim" -}}
{{- with .Values.models.pvc }}{{ .existingClaim | default (printf "%s-models" (include "vllm-sparse.fullname" $)) }}{{ end }}
{{- end }}

{{- /* Names of the variants that run, in a fixed order. */ -}}
{{- define "vllm-sparse.variants" -}}
{{- $names := list }}
{{- range $name := list "compressed" "dense" }}
{{- if (index $.Values.variants $name).enabled }}{{ $names = append $names $name }}{{ end }}
{{- end }}
{{- toJson $names }}
{{- end }}

{{- define "vllm-sparse.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "vllm-sparse.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "vllm-sparse.modelVolume" -}}
{{- if eq .Values.models.source "image" }}
image:
  reference: {{ required "models.image.reference: name the image that holds the model" .Values.models.image.reference }}
  pullPolicy: {{ .Values.models.image.pullPolicy }}
{{- else }}
persistentVolumeClaim:
  claimName: {{ include "vllm-sparse.claim" . }}
{{- end }}
{{- end }}
