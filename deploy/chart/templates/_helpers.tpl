{{- define "culvert.labels" -}}
app.kubernetes.io/name: culvert
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "culvert.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag }}{{ end }}
{{- end }}
{{- end }}

{{- /* Host paths that differ from platform to platform. The overlays beside the chart say the same. */}}
{{- define "culvert.cniBin" -}}
{{- $known := dict
  "gke" "/home/kubernetes/bin"
  "k3d" "/bin"
  "k3s" "/var/lib/rancher/k3s/data/cni"
  "microk8s" "/var/snap/microk8s/current/opt/cni/bin"
  "openshift" "/var/lib/cni/bin" }}
{{- .Values.hostPaths.cniBin | default (get $known .Values.platform) | default "/opt/cni/bin" }}
{{- end }}

{{- define "culvert.cniConf" -}}
{{- $known := dict
  "k3d" "/var/lib/rancher/k3s/agent/etc/cni/net.d"
  "k3s" "/var/lib/rancher/k3s/agent/etc/cni/net.d"
  "microk8s" "/var/snap/microk8s/current/args/cni-network"
  "openshift" "/etc/kubernetes/cni/net.d" }}
{{- .Values.hostPaths.cniConf | default (get $known .Values.platform) | default "/etc/cni/net.d" }}
{{- end }}

{{- define "culvert.seLinuxType" -}}
{{- .Values.security.seLinuxType | default (ternary "spc_t" "" (eq .Values.platform "openshift")) }}
{{- end }}

{{- /* Settings that follow from a value, which may mean more: a port is named in the pod too, a directory mounted. */}}
{{- define "culvert.values" -}}
agent-away: agent.agentAway
agent-socket: hostPaths.run
cni-bin-dir: hostPaths.cniBin
cni-chained: cni.chained
cni-conf-dir: hostPaths.cniConf
cni-conf-group-read: cni.confGroupRead
cni-conf-name: cni.confName
cni-install: cni.install
cni-own-config: cni.ownConfig
cni-own-config-name: cni.ownConfigName
decision-file: hostPaths.state
disable-safe-upgrade: agent.disableSafeUpgrade
dns-capture: agent.dnsCapture
dns-scope: agent.dnsScope
enablement-selectors: agent.enablementSelectors
excluded-namespaces: agent.excludedNamespaces
health-address: agent.healthPort
ipv6: agent.ipv6
log-format: agent.logFormat
log-level: agent.logLevel
metrics-address: agent.metricsPort
otlp-endpoint: agent.otlpEndpoint
probe-source: agent.probeSource
run-dir: hostPaths.run
system-namespace: agent.systemNamespace
ztunnel-grace: agent.ztunnelGrace
{{- end }}

{{- /* Settings of the agent that are not its defaults, as environment variables. */}}
{{- define "culvert.env" -}}
{{- $agent := .Values.agent }}
{{- $cni := .Values.cni }}
{{- $set := dict }}
{{- /* An empty variable counts as not set, so none is written as an empty list. */}}
{{- if kindIs "slice" $agent.excludedNamespaces }}
{{- $names := $agent.excludedNamespaces | join "," | default "[]" }}
{{- if ne $names "kube-system" }}{{ $_ := set $set "excluded-namespaces" $names }}{{ end }}
{{- end }}
{{- if ne $agent.systemNamespace "istio-system" }}{{ $_ := set $set "system-namespace" $agent.systemNamespace }}{{ end }}
{{- with $agent.enablementSelectors }}{{ $_ := set $set "enablement-selectors" (toJson .) }}{{ end }}
{{- if not $agent.dnsCapture }}{{ $_ := set $set "dns-capture" "false" }}{{ end }}
{{- if ne $agent.dnsScope "all" }}{{ $_ := set $set "dns-scope" $agent.dnsScope }}{{ end }}
{{- if not $agent.ipv6 }}{{ $_ := set $set "ipv6" "false" }}{{ end }}
{{- if ne $agent.probeSource "kubelet" }}{{ $_ := set $set "probe-source" $agent.probeSource }}{{ end }}
{{- if ne (toString $agent.ztunnelGrace) "10s" }}{{ $_ := set $set "ztunnel-grace" $agent.ztunnelGrace }}{{ end }}
{{- if ne $agent.agentAway "decisions" }}{{ $_ := set $set "agent-away" $agent.agentAway }}{{ end }}
{{- if ne (int $agent.metricsPort) 15014 }}{{ $_ := set $set "metrics-address" (printf ":%d" (int $agent.metricsPort)) }}{{ end }}
{{- if ne (int $agent.healthPort) 8000 }}{{ $_ := set $set "health-address" (printf ":%d" (int $agent.healthPort)) }}{{ end }}
{{- if ne $agent.logLevel "info" }}{{ $_ := set $set "log-level" $agent.logLevel }}{{ end }}
{{- if ne $agent.logFormat "text" }}{{ $_ := set $set "log-format" $agent.logFormat }}{{ end }}
{{- with $agent.otlpEndpoint }}{{ $_ := set $set "otlp-endpoint" . }}{{ end }}
{{- if $agent.disableSafeUpgrade }}{{ $_ := set $set "disable-safe-upgrade" "true" }}{{ end }}
{{- if not $cni.install }}{{ $_ := set $set "cni-install" "false" }}{{ end }}
{{- with $cni.confName }}{{ $_ := set $set "cni-conf-name" . }}{{ end }}
{{- if not $cni.chained }}{{ $_ := set $set "cni-chained" "false" }}{{ end }}
{{- $own := $cni.ownConfig | toString }}
{{- if and $cni.chained (eq $own "auto") (eq .Values.platform "cilium") }}{{ $own = "true" }}{{ end }}
{{- if ne $own "auto" }}{{ $_ := set $set "cni-own-config" $own }}{{ end }}
{{- with $cni.ownConfigName }}{{ $_ := set $set "cni-own-config-name" . }}{{ end }}
{{- if $cni.confGroupRead }}{{ $_ := set $set "cni-conf-group-read" "true" }}{{ end }}
{{- with .Values.hostPaths }}
{{- if ne .run "/run/culvert" }}
{{- $_ := set $set "run-dir" .run }}
{{- /* For `culvert status` in the container, which knows no run directory. */}}
{{- $_ := set $set "agent-socket" (printf "%s/agent.sock" .run) }}
{{- end }}
{{- if ne .state "/var/lib/culvert" }}{{ $_ := set $set "decision-file" (printf "%s/decisions.json" .state) }}{{ end }}
{{- end }}
{{- $values := include "culvert.values" . | fromYaml }}
{{- range $key, $value := .Values.settings }}
{{- with get $values $key }}{{ fail (printf "settings.%s: the chart has a value for this: set %s" $key .) }}{{ end }}
{{- $_ := set $set $key $value }}
{{- end }}
{{- range $key := keys $set | sortAlpha }}
- name: CULVERT_{{ $key | upper | replace "-" "_" }}
  value: {{ get $set $key | toString | quote }}
{{- end }}
{{- end }}

{{- /* What no schema can say. */}}
{{- define "culvert.check" -}}
{{- if eq (int .Values.agent.metricsPort) (int .Values.agent.healthPort) }}
{{- fail "agent.metricsPort and agent.healthPort are one port of the node: choose two" }}
{{- end }}
{{- if and .Values.image.digest (ne .Values.image.tag "dev") }}
{{- fail "image.digest and image.tag are both set: the digest says it all, leave the tag out" }}
{{- end }}
{{- end }}

