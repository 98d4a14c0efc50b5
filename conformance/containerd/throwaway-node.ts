// SPDX-License-Identifier: Apache-2.0
import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, rmdirSync } from 'node:fs';
import { chmod, readdir, rename, rm, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type ExecOptions, exec, must, Namespace, Running, type Testbed, until } from '../netns.ts';
import { CRI, type PodSandboxConfig } from './cri.ts';
import { busyboxArchive, busyboxImage } from './images.ts';

const init = fileURLToPath(new URL('./node-init.sh', import.meta.url));
const debianPlugins = '/usr/lib/cni';
/** Milliseconds that a step takes at most on a machine that is busy with other tests. */
const patience = 20_000;
const criSocket = '/run/containerd/containerd.sock';

/** /etc/containerd/config.toml. restrict_oom_score_adj: runc cannot lower oom_score_adj where CAP_SYS_RESOURCE is missing. */
export const containerdConfiguration = `version = 2
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "${busyboxImage}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
    max_conf_num = 1
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
`;

/** A CNI network configuration list (CNI specification, section 1). */
export type Conflist = {
  cniVersion: string;
  name: string;
  plugins: ({ type: string } & Record<string, unknown>)[];
};

/** What a pod has beside its name. */
export type PodMore = Pick<PodSandboxConfig, 'annotations' | 'labels' | 'port_mappings'> & { uid?: string };

export type Pod = {
  id: string;
  config: PodSandboxConfig;
  /** In the order of the CNI result. */
  addresses: string[];
  /** Path of the network namespace, inside the node. */
  netns: string;
};

/**
 * A node of its own on this machine: namespaces, the paths of a real node in memory, a real containerd.
 * It goes with the testbed it was started on, or with the calling process.
 */
export class ThrowawayNode {
  /** Also the name of its cgroups. */
  readonly name: string;
  /** Of the node's process 1, as seen from outside. */
  readonly pid: number;
  #containerd: Running | undefined;
  #cri: CRI | undefined;

  private constructor(name: string, pid: number) {
    this.name = name;
    this.pid = pid;
  }

  /** A node with Debian's reference plugins in /opt/cni/bin and no runtime yet. */
  static async start(testbed: Testbed, label = 'node'): Promise<ThrowawayNode> {
    const name = `${testbed.id}.${label}`;
    const namespaces = ['--mount', '--net', '--pid', '--ipc', '--uts', '--fork', '--kill-child'];
    const directory = testbed.directory(label);
    const first = testbed.start(['unshare', ...namespaces, '--', 'bash', init, directory, name]);
    await until(`throwaway node ${name} is laid out`, () => /^\d+\n/.test(first.output) || !first.alive, patience);
    const pid = Number.parseInt(first.output, 10);
    if (Number.isNaN(pid)) throw new Error(`throwaway node ${name}: ${first.output.trim() || 'its process 1 ended'}`);
    const node = new ThrowawayNode(name, pid);
    testbed.defer(() => node.#end());
    for (const plugin of await readdir(debianPlugins)) {
      await symlink(join(debianPlugins, plugin), node.path(`/opt/cni/bin/${plugin}`));
    }
    return node;
  }

  /** What `absolutePath` of the node is called outside. */
  path(absolutePath: string): string {
    return `/proc/${this.pid}/root${absolutePath}`;
  }

  /** The node's own network namespace, as the tools of netns.ts take it. */
  get namespace(): Namespace {
    return new PathNamespace(this.name, `/proc/${this.pid}/ns/net`);
  }

  /** The one at a path inside the node, such as a pod's. */
  namespaceAt(path: string): Namespace {
    // Links with an absolute target lead out of the node.
    return new PathNamespace(path, this.path(path.replace(/^\/var\/run\//, '/run/')));
  }

  /** The command line that runs `command` inside the node, in its network namespace or in that at `netns`. */
  argv(command: readonly string[], netns?: string): string[] {
    const namespaces = ['--mount', '--net', '--pid', '--ipc', '--uts'];
    const inside = netns ? ['nsenter', `--net=${netns}`, '--', ...command] : command;
    return ['nsenter', '--target', `${this.pid}`, ...namespaces, '--', ...inside];
  }

  /** Runs a command inside the node; returns its stdout; throws if it fails. */
  async run(command: readonly string[], options: ExecOptions & { netns?: string } = {}): Promise<string> {
    const { netns, ...rest } = options;
    const { status, signal, stdout, stderr } = await exec(this.argv(command, netns), rest);
    if (status !== 0) throw new Error(`${this.name}: ${command.join(' ')}: exit ${status ?? signal}: ${stderr.trim()}`);
    return stdout;
  }

  /**
   * Starts a command inside the node that lives on, at the longest as long as the node.
   * The process of the result is nsenter(1); the command gets SIGKILL when that ends. It is not given to the testbed:
   * killed before the node, it would leave a zombie to the host's process 1, and the node's end waits for zombies.
   */
  launch(command: readonly string[], netns?: string): Running {
    const dieWithParent = ['setpriv', '--pdeathsig', 'KILL', '--'];
    const argv = [...dieWithParent, ...this.argv([...dieWithParent, ...command], netns)];
    const [file = '', ...rest] = argv;
    return new Running(argv, spawn(file, rest, { stdio: ['ignore', 'pipe', 'pipe'] }));
  }

  /** Puts an executable of the host into /opt/cni/bin under `type`. */
  async installPlugin(type: string, executable: string): Promise<void> {
    const target = `/opt/cni/bin/${type}`;
    await writeFile(this.path(target), '');
    await this.run(['mount', '--bind', executable, target]);
  }

  /** Puts `recorder.ts` into /opt/cni/bin under `type`; returns the file (outside the node) that its calls go to. */
  async installRecorder(type: string): Promise<string> {
    const recorder = fileURLToPath(new URL('./recorder.ts', import.meta.url));
    const calls = `/run/${type}.calls`;
    const script = this.path(`/opt/cni/bin/${type}`);
    await writeFile(script, `#!/bin/sh\nexec '${process.execPath}' '${recorder}' ${calls}\n`);
    await chmod(script, 0o755);
    return this.path(calls);
  }

  /** Makes `conflist` the node's network. The runtime notices a file only when it appears by rename in its directory. */
  async writeConflist(conflist: Conflist): Promise<void> {
    const file = this.path('/etc/cni/net.d/10-throwaway.conflist');
    await writeFile(`${file}.new`, JSON.stringify(conflist, null, 2));
    await rename(`${file}.new`, file);
  }

  get cri(): CRI {
    if (!this.#cri) throw new Error(`throwaway node ${this.name}: containerd is not running`);
    return this.#cri;
  }

  /** Starts containerd and waits until it has a network; imports the image if it does not know it. */
  async startContainerd(): Promise<void> {
    await writeFile(this.path('/etc/containerd/config.toml'), containerdConfiguration);
    const recordPid = 'echo $$ >/run/containerd.pid; exec containerd --config /etc/containerd/config.toml';
    const containerd = this.launch(['sh', '-c', recordPid]);
    this.#containerd = containerd;
    const waitFor = async (what: string, condition: () => boolean | Promise<boolean>) =>
      await until(
        `${this.name}: ${what}`,
        async () => {
          if (!containerd.alive) throw new Error(`${this.name}: containerd ended: ${containerd.output}`);
          return await condition();
        },
        patience,
      );
    await waitFor(`${criSocket} exists`, () => existsSync(this.path(criSocket)));
    this.#cri = new CRI(this.path(criSocket));
    let wanting = '';
    await waitFor('containerd is ready', async () => {
      wanting = await this.#wanting();
      return wanting === '';
    }).catch((error: unknown) => {
      throw new Error(`${this.name}: containerd is not ready: ${wanting}`, { cause: error });
    });
    if (await this.#knowsImage()) return;
    await this.run(['ctr', '--namespace', 'k8s.io', 'images', 'import', '-'], { input: busyboxArchive() });
    await waitFor(`${busyboxImage} is known`, () => this.#knowsImage());
  }

  /** What keeps containerd from running pods; '' for nothing. */
  async #wanting(): Promise<string> {
    try {
      const { status } = await this.cri.call('Status', {});
      const absent = status.conditions.filter((condition) => !condition.status);
      return absent.map(({ type, reason, message }) => `${type}: ${reason}, ${message}`).join('; ');
    } catch (error) {
      return String(error); // its socket is there before it answers
    }
  }

  async #knowsImage(): Promise<boolean> {
    const { images } = await this.cri.call('ListImages', {});
    return images.some((image) => image.repo_tags.includes(busyboxImage));
  }

  /** Ends containerd with SIGKILL; shims and pods live on. */
  async killContainerd(): Promise<void> {
    const containerd = this.#containerd;
    if (!containerd) throw new Error(`throwaway node ${this.name}: containerd is not running`);
    this.#cri?.close();
    this.#cri = undefined;
    this.#containerd = undefined;
    await this.run(['kill', '-KILL', readFileSync(this.path('/run/containerd.pid'), 'utf8').trim()]);
    // nsenter(1), which waits for it.
    await containerd.ended;
    await rm(this.path(criSocket), { force: true });
  }

  /** RunPodSandbox as kubelet asks for it. */
  async runPod(namespace: string, name: string, { uid = randomUUID(), ...more }: PodMore = {}): Promise<Pod> {
    const config: PodSandboxConfig = {
      metadata: { name, namespace, uid },
      hostname: name,
      // As kubelet calls it: the agent finds pods by it.
      linux: { cgroup_parent: `/${this.name}/pod${uid}` },
      ...more,
    };
    const { pod_sandbox_id: id } = await this.cri.call('RunPodSandbox', { config });
    const { status, info } = await this.cri.call('PodSandboxStatus', { pod_sandbox_id: id, verbose: true });
    const { runtimeSpec } = JSON.parse(info.info ?? '{}') as {
      runtimeSpec?: { linux?: { namespaces?: { type: string; path?: string }[] } };
    };
    const netns = runtimeSpec?.linux?.namespaces?.find(({ type }) => type === 'network')?.path;
    if (!netns || !status.network)
      throw new Error(`pod ${namespace}/${name}: containerd tells no network: ${info.info}`);
    const addresses = [status.network.ip, ...status.network.additional_ips.map(({ ip }) => ip)];
    return { id, config, addresses, netns };
  }

  /** Creates and starts a container of `busyboxImage` in `pod`; returns its id. */
  async runContainer(pod: Pod, name: string, command: string[]): Promise<string> {
    const { container_id } = await this.cri.call('CreateContainer', {
      pod_sandbox_id: pod.id,
      config: { metadata: { name }, image: { image: busyboxImage }, command },
      sandbox_config: pod.config,
    });
    await this.cri.call('StartContainer', { container_id });
    return container_id;
  }

  /** ExecSync. */
  async exec(
    container_id: string,
    cmd: string[],
    seconds = 10,
  ): Promise<{ stdout: string; stderr: string; code: number }> {
    const { stdout, stderr, exit_code } = await this.cri.call('ExecSync', { container_id, cmd, timeout: seconds });
    return { stdout: stdout.toString(), stderr: stderr.toString(), code: exit_code };
  }

  /** StopPodSandbox and RemovePodSandbox, in kubelet's order. */
  async removePod(pod: Pod): Promise<void> {
    await this.cri.call('StopPodSandbox', { pod_sandbox_id: pod.id });
    await this.cri.call('RemovePodSandbox', { pod_sandbox_id: pod.id });
  }

  /** Ends every process of the node and takes away its cgroups, which outlive their processes. */
  #end(): void {
    this.#cri?.close();
    this.#cri = undefined;
    must(['kill', '-KILL', `${this.pid}`]);
    // A process 1 is gone only when all of its namespace is; unshare(1) reaps it.
    const tick = new Int32Array(new SharedArrayBuffer(4));
    const deadline = performance.now() + 10_000;
    while (existsSync(`/proc/${this.pid}`)) {
      if (performance.now() > deadline) throw new Error(`${this.name}: process ${this.pid} outlives SIGKILL`);
      Atomics.wait(tick, 0, 0, 5);
    }
    // A hierarchy that is mounted twice shows each directory twice.
    for (const cgroup of this.cgroups()) if (existsSync(cgroup)) removeCgroup(cgroup);
  }

  /** The cgroup directories of this node's pods, one for each hierarchy. */
  cgroups(): string[] {
    const mounts = readFileSync('/proc/self/mounts', 'utf8').split('\n');
    return mounts
      .map((mount) => mount.split(' '))
      .filter(([, , type]) => type === 'cgroup' || type === 'cgroup2')
      .map(([, mountPoint]) => `${mountPoint}/${this.name}`)
      .filter((path) => existsSync(path));
  }
}

class PathNamespace extends Namespace {
  readonly #path: string;

  constructor(name: string, path: string) {
    super(name);
    this.#path = path;
  }

  override get path(): string {
    return this.#path;
  }
}

/** With those below it. */
export function removeCgroup(path: string): void {
  for (const entry of readdirSync(path, { withFileTypes: true })) {
    if (entry.isDirectory()) removeCgroup(join(path, entry.name));
  }
  rmdirSync(path);
}
