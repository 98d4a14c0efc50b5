{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/*
What Istio 1.20 has under "cni." goes over what is at the top. Every template begins with this; doing it again changes
nothing.
*/}}
{{- define "ambient-redirect.values" -}}
{{- if .Values.cni -}}
{{- $_ := mergeOverwrite .Values (deepCopy .Values.cni) -}}
{{- end -}}
{{- $v := .Values -}}
{{- if not $v.ambient.enabled -}}
{{- fail "ambient.enabled is false: this chart is nothing but ambient redirection" -}}
{{- end -}}
{{- if eq (lower $v.ambient.redirectMode) "iptables" -}}
{{- fail "ambient.redirectMode is iptables: this chart redirects with eBPF and nothing else" -}}
{{- end -}}
{{- if eq (last (splitList "/" $v.image)) "install-cni" -}}
{{- fail "image is install-cni: that is Istio's own node agent; hub, image and tag name ambient-redirect's image here" -}}
{{- end -}}
{{- if not $v.chained -}}
{{- fail "chained is false: the plugin works on an interface that another plugin of its list has made; with multus, cniConfFileName names the configuration of the default network" -}}
{{- end -}}
{{- with $v.updateStrategy.rollingUpdate -}}
{{- if and .maxSurge (ne (toString .maxSurge) "0") (ne (toString .maxSurge) "0%") -}}
{{- fail "updateStrategy.rollingUpdate.maxSurge has to be 0: a node has one agent, which holds the lock in agent.runDir and the ports" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels of every object. */}}
{{- define "ambient-redirect.labels" -}}
app.kubernetes.io/name: ambient-redirect
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: istio
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* Cluster-wide names: there may be a release for each pool of nodes. */}}
{{- define "ambient-redirect.cluster-name" -}}
ambient-redirect-{{ .Release.Namespace }}
{{- end -}}

{{- define "ambient-redirect.image" -}}
{{- $v := .Values -}}
{{- if contains "/" $v.image -}}
{{ $v.image }}
{{- else -}}
{{- with $v.hub }}{{ trimSuffix "/" . }}/{{ end }}{{ $v.image }}:{{ $v.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/*
Istio writes levels for each of its scopes, "default:info,cni:debug", and has two that we do not: none and fatal.
*/}}
{{- define "ambient-redirect.level" -}}
{{- $level := . -}}
{{- if contains ":" . -}}
{{- $scopes := dict -}}
{{- range splitList "," . -}}
{{- $pair := splitn ":" 2 (trim .) -}}
{{- $_ := set $scopes $pair._0 $pair._1 -}}
{{- end -}}
{{- $level = $scopes.cni | default $scopes.default | default "info" -}}
{{- end -}}
{{- if has $level (list "none" "fatal") }}error{{ else }}{{ $level }}{{ end -}}
{{- end -}}

{{/* "shared" or "in-pod" */}}
{{- define "ambient-redirect.contract" -}}
{{- $said := dig "proxy" "contract" "" .Values.entry -}}
{{- $said | default (ternary "shared" "in-pod" (eq (lower .Values.ambient.redirectMode) "ebpf")) -}}
{{- end -}}

{{/*
The conflist entry in JSON: what `entry` says over what other values say. Both install, which writes it into the
conflist, and the agent, which enrols by it, read it from one file.
*/}}
{{- define "ambient-redirect.entry" -}}
{{- $v := .Values -}}
{{- $proxy := dict "contract" (include "ambient-redirect.contract" .) "match" (dict "namespace" .Release.Namespace) -}}
{{- $entry := dict "type" "ambient-redirect" "proxy" $proxy "dnsCapture" $v.ambient.dnsCapture -}}
{{- $_ := set $entry "excludeNamespaces" (append $v.excludeNamespaces .Release.Namespace | uniq) -}}
{{- $_ := set $entry "logLevel" (include "ambient-redirect.level" $v.logLevel) -}}
{{- mergeOverwrite $entry (deepCopy $v.entry) | toPrettyJson -}}
{{- end -}}
