{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* What the pods of the agent and of its removal have in common. Each right and each mount has its reason beside it. */}}

{{- define "ambient-redirect.pull-secrets" -}}
{{- $names := .Values.imagePullSecrets -}}
{{- range dig "imagePullSecrets" list (.Values.global | default dict) -}}
{{- $names = append $names . -}}
{{- end -}}
{{- range $names | uniq }}
- name: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "ambient-redirect.pull-policy" -}}
{{- with .Values.pullPolicy | default (dig "imagePullPolicy" "" (.Values.global | default dict)) -}}
imagePullPolicy: {{ . }}
{{- end -}}
{{- end -}}

{{/* Where the pods run, and as what. */}}
{{- define "ambient-redirect.placement" -}}
# It starts without any CNI call: a node whose network is not there yet, or broken, gets its agent all the same, and the
# plugin is never asked about it. The links, filters and routes that it compares and repairs in the contract "shared" are
# those of the node, and interface numbers mean nothing elsewhere.
hostNetwork: true
# Without a name of the cluster to look up, it does not depend on the cluster's DNS, whose pods may be in the mesh.
dnsPolicy: Default
hostPID: {{ .Values.hostPID }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
nodeSelector:
  {{- merge (dict "kubernetes.io/os" "linux") .Values.nodeSelector | toYaml | nindent 2 }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "ambient-redirect.pull-secrets" . | trim }}
imagePullSecrets:
  {{- . | nindent 2 }}
{{- end }}
# The token is mounted into the containers that call the API, and into no other.
automountServiceAccountToken: false
enableServiceLinks: false
{{- end -}}

{{/* Not privileged, and of the capabilities those that a test found to be needed by taking each away. */}}
{{- define "ambient-redirect.security" -}}
securityContext:
  # Directories, sockets and pins of the node are root's.
  runAsUser: 0
  runAsGroup: 0
  runAsNonRoot: false
  privileged: false
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    add:
      # Links, qdiscs and filters of the node and of pods; rules and routes where a proxy listens.
      - NET_ADMIN
      # Entering the network namespaces of pods, for which there is none that allows less. It allows what BPF and PERFMON
      # do: maps, programs, links.
      - SYS_ADMIN
      # /proc/PID/ns and /proc/1/root of processes with other rights: pods that no file leads to, ztunnel's cgroup.
      - SYS_PTRACE
      # Conflists and directories of the node that belong to somebody else than root, and keep belonging to them.
      - DAC_OVERRIDE
      - CHOWN
      - FOWNER
  {{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}
  # containerd's and Docker's own profiles deny writing below /sys/fs/bpf.
  appArmorProfile:
    type: Unconfined
  {{- end }}
  {{- with .Values.seccompProfile }}
  seccompProfile:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.seLinuxOptions }}
  seLinuxOptions:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* Mounts that install, agent and uninstall have in common: the node's directories, at the node's own paths. */}}
{{- define "ambient-redirect.mounts" -}}
# The addon is loaded from a file without a name: the root is read-only, /dev/shm is noexec.
- name: tmp
  mountPath: /tmp
# Pinned maps, programs and links. HostToContainer: the node's bpffs may be mounted after this pod has started; another
# instance of it would not be the plugin's.
- name: bpffs
  mountPath: /sys/fs/bpf
  mountPropagation: HostToContainer
# Locks, what install was told, agent.sock. The plugin has the same.
- name: run
  mountPath: {{ .Values.agent.runDir }}
# The entry is put into a conflist of this directory, and kept there.
- name: cni-net-dir
  mountPath: {{ .Values.cniConfDir }}
# Network namespaces of pods. HostToContainer: those of pods that come later, too.
- name: netns
  mountPath: {{ .Values.cniNetnsDir }}
  mountPropagation: HostToContainer
{{- end -}}

{{- define "ambient-redirect.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 64Mi
- name: bpffs
  hostPath:
    path: /sys/fs/bpf
    type: Directory
- name: run
  hostPath:
    path: {{ .Values.agent.runDir }}
    type: DirectoryOrCreate
- name: cni-net-dir
  hostPath:
    path: {{ .Values.cniConfDir }}
    # Who installs the primary plugin may be the one who makes it; install waits for that.
    type: DirectoryOrCreate
- name: cni-bin-dir
  hostPath:
    path: {{ .Values.cniBinDir }}
    type: DirectoryOrCreate
- name: netns
  hostPath:
    path: {{ .Values.cniNetnsDir }}
    # Runtimes make it for the first pod with a network of its own.
    type: DirectoryOrCreate
{{ include "ambient-redirect.token-volume" . }}
{{- end -}}

{{- define "ambient-redirect.token-volume" -}}
# What kubelet mounts by itself into every container, for one of them.
- name: token
  projected:
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3607
      - configMap:
          name: kube-root-ca.crt
          items:
            - key: ca.crt
              path: ca.crt
{{- end -}}

{{- define "ambient-redirect.token-mount" -}}
- name: token
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end -}}

{{/* A map of variables as a list, by name; those of `env` go over them. Values that are empty are not set. */}}
{{- define "ambient-redirect.environment" -}}
{{- $variables := dict -}}
{{- range $name, $value := .variables -}}
{{- if ne (toString $value) "" -}}
{{- $_ := set $variables $name (toString $value) -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := .env -}}
{{- $_ := set $variables $name (toString $value) -}}
{{- end -}}
{{- range $name, $value := $variables }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end -}}
{{- end -}}

{{/* Variables of install, agent and uninstall. */}}
{{- define "ambient-redirect.directories" -}}
AMBIENT_REDIRECT_STATE_DIR: {{ .Values.agent.stateDir }}
CNI_AGENT_RUN_DIR: {{ .Values.agent.runDir }}
{{- end -}}

{{- define "ambient-redirect.install-variables" -}}
{{ include "ambient-redirect.directories" . }}
AMBIENT_REDIRECT_CONF: /etc/ambient-redirect/entry.json
CNI_NET_DIR: {{ .Values.cniConfDir }}
CNI_BIN_DIR: {{ .Values.cniBinDir }}
CNI_CONF_NAME: {{ .Values.cniConfFileName | quote }}
ISTIO_OWNED_CNI_CONFIG: {{ .Values.istioOwnedCNIConfig | quote }}
ISTIO_OWNED_CNI_CONFIG_FILENAME: {{ .Values.istioOwnedCNIConfigFileName | quote }}
AMBIENT_REDIRECT_CNI_VERSION: {{ .Values.install.cniVersion | quote }}
AMBIENT_REDIRECT_REPLACE_ISTIO_CNI: {{ .Values.install.replaceIstioCni | quote }}
CNI_CONF_GROUP_READ: {{ .Values.install.groupRead | quote }}
AMBIENT_REDIRECT_WAIT: {{ .Values.install.wait | quote }}
{{- end -}}

{{- define "ambient-redirect.agent-variables" -}}
{{ include "ambient-redirect.directories" . }}
AMBIENT_REDIRECT_CONF: /etc/ambient-redirect/entry.json
# In the contract "shared" no ztunnel connects, and the socket of one that another node agent serves is left alone.
ZTUNNEL_UDS_ADDRESS: {{ ternary .Values.agent.zdsSocket (printf "%s/ztunnel.sock" .Values.agent.runDir) (eq (include "ambient-redirect.contract" .) "in-pod") }}
AMBIENT_REDIRECT_ADDRESS: {{ .Values.agent.address | quote }}
MONITORING_PORT: {{ .Values.agent.monitoringPort | int | quote }}
AMBIENT_REDIRECT_HEALTH_PORT: {{ .Values.agent.healthPort | int | quote }}
LOG_LEVEL: {{ include "ambient-redirect.level" (.Values.logging.level | default (dig "logging" "level" "" (.Values.global | default dict)) | default "info") }}
AMBIENT_REDIRECT_KUBE_API: {{ .Values.agent.kubeApi | quote }}
AMBIENT_REDIRECT_CRI_SOCKET: {{ .Values.agent.criSocket | quote }}
{{- with .Values.ambient.enablementSelectors }}
AMBIENT_ENABLEMENT_SELECTOR: {{ toJson . | quote }}
{{- end }}
{{- if .Values.ambient.redirectMode }}
REDIRECT_MODE: {{ lower .Values.ambient.redirectMode }}
AMBIENT_CONFIG_DIR: {{ include "ambient-redirect.config-dir" . }}
{{- end }}
AMBIENT_REDIRECT_RECONCILE_SECONDS: {{ .Values.agent.reconcileSeconds | quote }}
AMBIENT_REDIRECT_ZTUNNEL_WAIT_SECONDS: {{ .Values.agent.ztunnelWaitSeconds | quote }}
{{- end -}}

{{- define "ambient-redirect.uninstall-variables" -}}
{{ include "ambient-redirect.directories" . }}
CNI_NET_DIR: {{ .Values.cniConfDir }}
CNI_BIN_DIR: {{ .Values.cniBinDir }}
AMBIENT_REDIRECT_KUBE_API: {{ .Values.agent.kubeApi | quote }}
AMBIENT_REDIRECT_DRAIN_TIMEOUT: {{ .Values.uninstall.drainTimeout | quote }}
AMBIENT_REDIRECT_EXECUTABLE_DELAY: {{ .Values.uninstall.executableDelay | quote }}
{{- end -}}

{{- define "ambient-redirect.wait-variables" -}}
AMBIENT_REDIRECT_KUBE_API: {{ .Values.agent.kubeApi | quote }}
AMBIENT_REDIRECT_UNINSTALL_DAEMON_SET: {{ .Release.Namespace }}/istio-cni-node-uninstall
AMBIENT_REDIRECT_AGENT_DAEMON_SET: {{ .Release.Namespace }}/istio-cni-node
AMBIENT_REDIRECT_UNINSTALL_TIMEOUT: {{ .Values.uninstall.timeout | quote }}
{{- end -}}

{{/* (list . STAY) */}}
{{- define "ambient-redirect.uninstall-container" -}}
{{- $stay := index . 1 -}}
{{- with index . 0 -}}
image: {{ include "ambient-redirect.image" . | quote }}
{{- with include "ambient-redirect.pull-policy" . }}
{{ . }}
{{- end }}
args: [uninstall]
env:
  - name: NODE_NAME
    valueFrom:
      fieldRef:
        fieldPath: spec.nodeName
  {{- $variables := include "ambient-redirect.uninstall-variables" . | fromYaml }}
  {{- $_ := set $variables "AMBIENT_REDIRECT_STAY" $stay }}
  {{- include "ambient-redirect.environment" (dict "variables" $variables "env" .Values.env) | trim | nindent 2 }}
{{ include "ambient-redirect.security" . }}
resources:
  requests:
    cpu: 10m
    memory: 64Mi
volumeMounts:
  {{- include "ambient-redirect.mounts" . | nindent 2 }}
  # The executable goes from here.
  - name: cni-bin-dir
    mountPath: {{ .Values.cniBinDir }}
  # Where CRI-O keeps what it will call DEL with.
  - name: cni-cache
    mountPath: /var/lib/cni
    readOnly: true
  # The pods' annotations go.
  {{- include "ambient-redirect.token-mount" . | nindent 2 }}
{{- end -}}
{{- end -}}

{{- define "ambient-redirect.config-dir" -}}
{{ .Values.ambient.configDir | default "/etc/ambient-config" }}
{{- end -}}

{{/* (list . PATH) */}}
{{- define "ambient-redirect.probe" -}}
{{- $v := (index . 0).Values -}}
httpGet:
  path: {{ index . 1 }}
  port: health
  {{- with $v.agent.address }}
  host: {{ . | quote }}
  {{- end }}
{{- end -}}
