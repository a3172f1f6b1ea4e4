{{/* Of a program's objects, and which Pods are its; the argument is its name. */}}
{{- define "gpupool.labels" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: gpupool
{{- end }}

{{/* Not empty if the API server is at least of a version: (dict "root" $ "version" "1.28") */}}
{{- define "gpupool.since" -}}
{{- $is := .root.Values.kubernetesVersion | default .root.Capabilities.KubeVersion.Version -}}
{{- if semverCompare (printf ">=%s-0" .version) $is }}yes{{ end -}}
{{- end }}

{{- define "gpupool.disruptionBudget" -}}
apiVersion: policy/v1{{ if not (include "gpupool.since" (dict "root" .root "version" "1.21")) }}beta1{{ end }}
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "gpupool.labels" .name | nindent 4 }}
spec:
  minAvailable: 1
  selector:
    matchLabels:
      {{- include "gpupool.labels" .name | nindent 6 }}
{{- end }}

{{/* What all containers have; the Pods run as this user whatever the image says. */}}
{{- define "gpupool.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "gpupool.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "gpupool.smallResources" -}}
requests:
  cpu: 50m
  memory: 128Mi
limits:
  memory: 256Mi
{{- end }}

{{- define "gpupool.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
