{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/*
(list MAP OTHER): what OTHER has goes into MAP, but for what is empty there. sprig's mergeOverwrite does not let false go
over true.
*/}}
{{- define "ambient-redirect.over" -}}
{{- $map := index . 0 -}}
{{- range $key, $value := index . 1 -}}
{{- $there := get $map $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $there) -}}
{{- include "ambient-redirect.over" (list $there $value) -}}
{{- else if not (or (kindIs "invalid" $value) (eq (toString $value) "")) -}}
{{- $_ := set $map $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
What Istio 1.20 has under "cni." goes over what is at the top. Every template begins with this; doing it again changes
nothing.
*/}}
{{- define "ambient-redirect.values" -}}
{{- with .Values.cni -}}
{{- include "ambient-redirect.over" (list $.Values (deepCopy .)) -}}
{{- end -}}
{{- $v := .Values -}}
{{- if not $v.cniBinDir -}}
{{- $_ := set $v "cniBinDir" (ternary "/home/kubernetes/bin" "/opt/cni/bin" (contains "-gke" .Capabilities.KubeVersion.Version)) -}}
{{- end -}}
{{- if not $v.cniNetnsDir -}}
{{- $_ := set $v "cniNetnsDir" "/var/run/netns" -}}
{{- end -}}
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
{{- include "ambient-redirect.over" (list $entry (deepCopy $v.entry)) -}}
{{- toPrettyJson $entry -}}
{{- end -}}

{{/* "- PATH: REASON" for each value of files/ignored.yaml that was given. */}}
{{- define "ambient-redirect.ignored" -}}
{{- $values := .Values -}}
{{- range $path, $reason := .Files.Get "files/ignored.yaml" | fromYaml -}}
{{- $found := dict "value" $values "given" true -}}
{{- range $key := splitList "." $path -}}
{{- if and $found.given (kindIs "map" $found.value) (hasKey $found.value $key) -}}
{{- $_ := set $found "value" (index $found.value $key) -}}
{{- else -}}
{{- $_ := set $found "given" false -}}
{{- end -}}
{{- end -}}
{{- /* Istio's own values.yaml has most of them empty, which asks for nothing. */ -}}
{{- if and $found.given (not (kindIs "invalid" $found.value)) (ne (toString $found.value) "") }}
- {{ $path }}: {{ $reason }}
{{- end -}}
{{- end -}}
{{- end -}}
