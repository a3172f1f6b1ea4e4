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

{{- define "gpupool.poolAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: gpupool
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "gpupool.labels" "gpupool" | nindent 4 }}
automountServiceAccountToken: false
{{- end }}

{{- define "gpupool.poolClaim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: gpupool
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "gpupool.labels" "gpupool" | nindent 4 }}
  annotations:
    # The ledger, the authority and all tokens: they outlive the release.
    helm.sh/resource-policy: keep
spec:
  accessModes: [ReadWriteOnce]
  {{- with .Values.pool.storage.className }}
  storageClassName: {{ . | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ .Values.pool.storage.size }}
{{- end }}

{{/* Names of a farm's pool servers, in the order in which to ask them. */}}
{{- define "gpupool.farmAddresses" -}}
{{- $namespace := .Release.Namespace -}}
{{- if .Values.pool.database.secret -}}
{{- range $n := until 2 }}{{ if $n }}, {{ end }}"gpupool-{{ $n }}.gpupool-pool.{{ $namespace }}.svc"{{ end -}}
{{- else -}}
"gpupool.{{ $namespace }}.svc", "gpupool.{{ $namespace }}.svc.cluster.local", "gpupool.{{ $namespace }}"
{{- end -}}
{{- end }}

{{/* Of the Pods of a farm, which reach each other: the variables, volumes and their places. */}}
{{- define "gpupool.rayEnvironment" -}}
- { name: HOME, value: /tmp }
- { name: RAY_AUTH_MODE, value: token }
- { name: RAY_AUTH_TOKEN_PATH, value: /var/run/secrets/gpupool.io/ray/token }
- { name: RAY_USAGE_STATS_ENABLED, value: "0" }
- { name: POD_IP, valueFrom: { fieldRef: { fieldPath: status.podIP } } }
{{- end }}

{{- define "gpupool.rayMounts" -}}
- { name: ray, mountPath: /var/run/secrets/gpupool.io/ray, readOnly: true }
- { name: tmp, mountPath: /tmp }
- { name: shm, mountPath: /dev/shm }
{{- end }}

{{- define "gpupool.rayVolumes" -}}
- name: ray
  secret:
    secretName: gpupool-authority
    defaultMode: 0440
    items:
      - { key: ray.token, path: token }
# For the files of Ray and of workers, and what their processes share.
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir:
    medium: Memory
{{- end }}

{{- define "gpupool.authorityVolume" -}}
- name: authority
  secret:
    secretName: gpupool-authority
    defaultMode: 0440
    items:
      - { key: ca.crt, path: ca.crt }
      - { key: ca.key, path: ca.key }
{{- end }}

{{/* Members of a farm may reach all of each other's ports: (dict "root" $ "name" "gpupool" "ingress" "- ports: …") */}}
{{- define "gpupool.farmNetworkPolicy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "gpupool.labels" .name | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      {{- include "gpupool.labels" .name | nindent 6 }}
  policyTypes: [Ingress]
  ingress:
    - from:
        - podSelector:
            matchExpressions:
              - { key: app.kubernetes.io/name, operator: In, values: [gpupool, gpupool-ray, gpupool-server] }
    {{- with .ports }}
    - ports:
        {{- range . }}
        - { protocol: TCP, port: {{ . }} }
        {{- end }}
    {{- end }}
    {{- with .monitoring }}
    - from:
        - namespaceSelector:
            matchLabels:
              kubernetes.io/metadata.name: {{ . | quote }}
      ports:
        - { protocol: TCP, port: metrics }
    {{- end }}
{{- end }}
