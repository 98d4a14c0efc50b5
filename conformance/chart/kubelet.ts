// SPDX-License-Identifier: Apache-2.0
//
// What kubelet makes of a pod of the chart, as far as containerd is concerned: sandbox and containers with exactly the
// rights, mounts and variables that helm rendered, through the CRI.

import { copyFileSync, mkdirSync, readFileSync, realpathSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ContainerConfig, MountPropagation, PodSandboxConfig } from '../containerd/cri.ts';
import { tar } from '../containerd/images.ts';
import type { ThrowawayNode } from '../containerd/throwaway-node.ts';
import { must, until } from '../netns.ts';

export interface ChartContainer {
  name: string;
  args: string[];
  env: { name: string; value?: string }[];
  volumeMounts: { name: string; mountPath: string; readOnly?: boolean; mountPropagation?: string }[];
  securityContext: {
    runAsUser: number;
    allowPrivilegeEscalation: boolean;
    readOnlyRootFilesystem: boolean;
    capabilities: { drop: string[]; add: string[] };
    seccompProfile?: { type: 'RuntimeDefault' | 'Unconfined' };
  };
}

export interface ChartPod {
  hostNetwork: boolean;
  hostPID: boolean;
  initContainers: ChartContainer[];
  containers: ChartContainer[];
  volumes: {
    name: string;
    hostPath?: { path: string; type?: string };
    configMap?: { name: string };
    emptyDir?: object;
    projected?: object;
  }[];
}

/** What stands in the place of the API's objects. */
export interface PodObjects {
  node: ThrowawayNode;
  nodeName: string;
  /** by name, then file */
  configMaps: Record<string, Record<string, string>>;
  token: string;
  caFile: string;
}

export const IMAGE = 'cri.local/ambient-redirect:1';

/** The executable and what it needs of this machine's libraries, as `ctr images import` takes it. */
export async function importImage(node: ThrowawayNode, executable: string): Promise<void> {
  const libraries = [...must(['ldd', executable]).matchAll(/(?:=> |^\s*)(\/\S+) \(0x/gm)].map(([, path = '']) => path);
  const files = libraries.map((path) => ({
    name: path.slice(1),
    mode: 0o755,
    content: readFileSync(realpathSync(path)),
  }));
  const layer = tar([
    ...files,
    { name: 'usr/bin/ambient-redirect', mode: 0o755, content: readFileSync(executable) },
    { name: 'tmp/', mode: 0o1777, directory: true },
  ]);
  const { createHash } = await import('node:crypto');
  const configuration = JSON.stringify({
    architecture: { x64: 'amd64', arm64: 'arm64' }[process.arch as 'x64' | 'arm64'] ?? process.arch,
    os: 'linux',
    config: { Entrypoint: ['/usr/bin/ambient-redirect'], Env: ['PATH=/usr/bin'] },
    rootfs: { type: 'layers', diff_ids: [`sha256:${createHash('sha256').update(layer).digest('hex')}`] },
  });
  const archive = tar([
    {
      name: 'manifest.json',
      content: JSON.stringify([{ Config: 'config.json', RepoTags: [IMAGE], Layers: ['layer.tar'] }]),
    },
    { name: 'config.json', content: configuration },
    { name: 'layer.tar', content: layer },
  ]);
  await node.run(['ctr', '--namespace', 'k8s.io', 'images', 'import', '-'], { input: archive, timeout: 120_000 });
}

export class Kubelet {
  readonly #objects: PodObjects;
  #count = 0;

  constructor(objects: PodObjects) {
    this.#objects = objects;
  }

  /** Throws what the runtime says. */
  async startPod(pod: ChartPod, name: string): Promise<RunningPod> {
    const { node } = this.#objects;
    const number = ++this.#count;
    const config: PodSandboxConfig = {
      metadata: { name: `${name}-${number}`, namespace: 'istio-system', uid: crypto.randomUUID() },
      // A pod in the node's network namespace has the node's.
      ...(!pod.hostNetwork && { hostname: name }),
      log_directory: '/run/pod-logs',
      linux: {
        cgroup_parent: `/${node.name}/${name}-${number}`,
        security_context: {
          namespace_options: {
            network: pod.hostNetwork ? 'NODE' : 'POD',
            pid: pod.hostPID ? 'NODE' : 'CONTAINER',
          },
        },
      },
    };
    mkdirSync(node.path('/run/pod-logs'), { recursive: true });
    const { pod_sandbox_id: id } = await node.cri.call('RunPodSandbox', { config });
    return new RunningPod(this.#objects, pod, id, config);
  }
}

export class RunningPod {
  readonly #objects: PodObjects;
  readonly #pod: ChartPod;
  readonly #id: string;
  readonly #config: PodSandboxConfig;

  constructor(objects: PodObjects, pod: ChartPod, id: string, config: PodSandboxConfig) {
    this.#objects = objects;
    this.#pod = pod;
    this.#id = id;
    this.#config = config;
  }

  /** Path of its network namespace on the node; undefined: it is the node's. */
  async netns(): Promise<string | undefined> {
    const { info } = await this.#objects.node.cri.call('PodSandboxStatus', { pod_sandbox_id: this.#id, verbose: true });
    const { runtimeSpec } = JSON.parse(info.info ?? '{}') as {
      runtimeSpec?: { linux?: { namespaces?: { type: string; path?: string }[] } };
    };
    return runtimeSpec?.linux?.namespaces?.find(({ type }) => type === 'network')?.path;
  }

  /** Creates and starts it; returns its id. Throws what the runtime says. */
  async start(container: ChartContainer): Promise<string> {
    const { node } = this.#objects;
    const { container_id } = await node.cri.call('CreateContainer', {
      pod_sandbox_id: this.#id,
      config: this.#container(container),
      sandbox_config: this.#config,
    });
    await node.cri.call('StartContainer', { container_id });
    return container_id;
  }

  /** Runs an init container; returns its exit code. */
  async finish(container: ChartContainer): Promise<number> {
    const { node } = this.#objects;
    const container_id = await this.start(container);
    let code = 0;
    await until(
      `${container.name} ends`,
      async () => {
        const { status } = await node.cri.call('ContainerStatus', { container_id });
        code = status.exit_code;
        return status.state === 'CONTAINER_EXITED';
      },
      60_000,
    );
    return code;
  }

  /** Of all its containers of that name. */
  log(container: string): string {
    try {
      return readFileSync(this.#objects.node.path(`/run/pod-logs/${this.#config.metadata.name}.${container}`), 'utf8')
        .split('\n')
        .map((line) => line.split(' ').slice(3).join(' '))
        .join('\n');
    } catch {
      return '';
    }
  }

  async remove(): Promise<void> {
    const { node } = this.#objects;
    await node.cri.call('StopPodSandbox', { pod_sandbox_id: this.#id });
    await node.cri.call('RemovePodSandbox', { pod_sandbox_id: this.#id });
  }

  #container({ name, args, env, volumeMounts, securityContext }: ChartContainer): ContainerConfig {
    const { nodeName } = this.#objects;
    const { capabilities, seccompProfile, runAsUser, readOnlyRootFilesystem } = securityContext;
    return {
      metadata: { name },
      image: { image: IMAGE },
      args,
      envs: [
        ...env.map(({ name: key, value }) => ({ key, value: value ?? nodeName })),
        { key: 'KUBERNETES_SERVICE_HOST', value: '127.0.0.1' },
        { key: 'KUBERNETES_SERVICE_PORT', value: '6443' },
      ],
      mounts: volumeMounts.map(({ name: volume, mountPath, readOnly = false, mountPropagation }) => ({
        container_path: mountPath,
        host_path: this.#volume(volume),
        readonly: readOnly,
        propagation: propagation(mountPropagation),
      })),
      log_path: `${this.#config.metadata.name}.${name}`,
      linux: {
        security_context: {
          capabilities: { add_capabilities: capabilities.add, drop_capabilities: capabilities.drop },
          run_as_user: { value: runAsUser },
          readonly_rootfs: readOnlyRootFilesystem,
          no_new_privs: !securityContext.allowPrivilegeEscalation,
          seccomp: { profile_type: seccompProfile?.type ?? 'Unconfined' },
          namespace_options: this.#config.linux?.security_context?.namespace_options ?? {},
        },
      },
    };
  }

  /** Path on the node. */
  #volume(name: string): string {
    const { node, configMaps, token, caFile } = this.#objects;
    const volume = this.#pod.volumes.find((one) => one.name === name);
    if (volume === undefined) throw new Error(`there is no volume ${name}`);
    if (volume.hostPath !== undefined) {
      const { path, type = '' } = volume.hostPath;
      if (type === 'DirectoryOrCreate') mkdirSync(node.path(path), { recursive: true });
      else statSync(node.path(path));
      return path;
    }
    const directory = `/var/lib/volumes/${this.#config.metadata.uid}/${name}`;
    mkdirSync(node.path(directory), { recursive: true });
    const file = (key: string) => node.path(join(directory, key));
    if (volume.configMap !== undefined) {
      const map = configMaps[volume.configMap.name] ?? {};
      for (const [key, text] of Object.entries(map)) writeFileSync(file(key), text);
    }
    if (volume.projected !== undefined) {
      writeFileSync(file('token'), token, { mode: 0o600 });
      copyFileSync(caFile, file('ca.crt'));
    }
    return directory;
  }
}

function propagation(name: string | undefined): MountPropagation {
  if (name === undefined) return 'PROPAGATION_PRIVATE';
  if (name === 'HostToContainer') return 'PROPAGATION_HOST_TO_CONTAINER';
  throw new Error(`mountPropagation ${name} is not one that a container without privileges gets`);
}
