// SPDX-License-Identifier: Apache-2.0
//
// A node as a cluster has it: containerd, kubelet and kube-proxy in namespaces of their own, with the ordinary paths. Its
// disk is a directory, so that it can be rebooted: every process, network namespace, bpffs and /run goes, /etc, /opt and
// /var stay.

import { existsSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { busyboxArchive } from '../containerd/images.ts';
import { containerdConfiguration, removeCgroup } from '../containerd/throwaway-node.ts';
import { type ExecOptions, exec, must, Namespace, type Running, type Testbed, until } from '../netns.ts';
import type { NodePrograms } from './build.ts';

const DEBIAN_PLUGINS = '/usr/lib/cni';
const START_MS = 60_000;
const CRI_SOCKET = '/run/containerd/containerd.sock';
export const CONFLIST = '/etc/cni/net.d/10-primary.conflist';

export interface NodeOptions {
  name: string;
  /** 1, 2, ...: of its addresses */
  number: number;
  primary: 'bridge' | 'ptp';
  programs: NodePrograms;
  api: { server: string; caFile: string; token: string; proxyToken: string };
  /** files for ctr images import */
  images: string[];
  /** where containerd, its shim and ctr are, if they are not the machine's */
  containerd?: string;
}

/** Addresses of a node's pods, and of the node itself. */
export function addressing(number: number) {
  return {
    node: `172.31.0.1${number}`,
    node6: `fd31::1${number}`,
    pods: `10.20${number}.0.0/24`,
    pods6: `fd00:20${number}::/64`,
  };
}

export class RealNode {
  readonly options: NodeOptions;
  readonly disk: string;
  /** Of processes that write there, for a report when something fails. */
  readonly logs: string;
  pid = 0;
  /** Of its cgroups: unique on the machine. */
  readonly cgroup: string;
  #init: Running | undefined;
  readonly #testbed: Testbed;

  private constructor(testbed: Testbed, options: NodeOptions) {
    this.#testbed = testbed;
    this.options = options;
    this.disk = testbed.directory(options.name);
    this.logs = testbed.directory(`${options.name}.logs`);
    this.cgroup = `${testbed.id}.${options.name}`;
  }

  get name(): string {
    return this.options.name;
  }

  static async start(testbed: Testbed, options: NodeOptions): Promise<RealNode> {
    const node = new RealNode(testbed, options);
    testbed.defer(() => node.#end());
    await node.boot();
    node.layOut();
    await node.startRuntime();
    for (const file of options.images) await node.ctr(['images', 'import', file], { timeout: 120_000 });
    await node.ctr(['images', 'import', '-'], { input: busyboxArchive() });
    return node;
  }

  /** Process 1, and the cable to the others. */
  async boot(): Promise<void> {
    const { name, number } = this.options;
    const namespaces = ['--mount', '--net', '--pid', '--ipc', '--uts', '--fork', '--kill-child'];
    const script = join(import.meta.dirname, 'node-init.sh');
    const init = this.#testbed.start(['unshare', ...namespaces, '--', 'bash', script, this.disk, this.cgroup]);
    await until(`node ${name} is laid out`, () => /^\d+\n/m.test(init.output) || !init.alive, START_MS);
    this.pid = Number.parseInt(init.output, 10);
    if (Number.isNaN(this.pid)) throw new Error(`node ${name}: ${init.output.trim()}`);
    this.#init = init;
    const uplink = `up-${number}`;
    const { node, node6 } = addressing(number);
    // A machine's own, which a reboot does not change: the other node would ask for the old one for seconds.
    const mac = `02:00:ac:1f:00:0${number}`;
    const peer = ['peer', 'name', 'uplink', 'address', mac, 'netns', String(this.pid)];
    must(['ip', 'link', 'add', uplink, 'type', 'veth', ...peer]);
    must(['ip', 'link', 'set', uplink, 'up', 'master', 'fabric']);
    await this.run(['ip', 'link', 'set', 'uplink', 'up']);
    await this.run(['ip', 'address', 'add', `${node}/24`, 'dev', 'uplink']);
    await this.run(['ip', 'address', 'add', `${node6}/64`, 'dev', 'uplink', 'nodad']);
    const other = addressing(3 - number);
    await this.run(['ip', 'route', 'add', other.pods, 'via', other.node]);
    await this.run(['ip', 'route', 'add', other.pods6, 'via', other.node6]);
    await this.run(['ip', 'route', 'add', 'default', 'via', '172.31.0.1']);
  }

  /** Configuration: the part of the disk that an administrator writes. */
  layOut(): void {
    const { name, api, primary, number } = this.options;
    const { pods, pods6 } = addressing(number);
    for (const plugin of readdirSync(DEBIAN_PLUGINS)) {
      symlinkSync(join(DEBIAN_PLUGINS, plugin), this.path(`/opt/cni/bin/${plugin}`));
    }
    const ipam = {
      type: 'host-local',
      ranges: [[{ subnet: pods }], [{ subnet: pods6 }]],
      routes: [{ dst: '0.0.0.0/0' }, { dst: '::/0' }],
    };
    const first =
      primary === 'bridge'
        ? { type: 'bridge', bridge: 'cni0', isGateway: true, hairpinMode: true, ipam }
        : { type: 'ptp', ipam };
    const conflist = {
      cniVersion: '1.0.0',
      name: 'primary',
      plugins: [first, { type: 'portmap', capabilities: { portMappings: true } }],
    };
    writeFileSync(this.path(CONFLIST), `${JSON.stringify(conflist, null, 2)}\n`);
    writeFileSync(this.path('/etc/containerd/config.toml'), containerdConfiguration);
    const kubeconfig = (token: string) =>
      JSON.stringify({
        apiVersion: 'v1',
        kind: 'Config',
        clusters: [{ name: 'c', cluster: { server: api.server, 'certificate-authority': '/etc/kubernetes/ca.crt' } }],
        users: [{ name: 'u', user: { token } }],
        contexts: [{ name: 'x', context: { cluster: 'c', user: 'u' } }],
        'current-context': 'x',
      });
    writeFileSync(this.path('/etc/kubernetes/ca.crt'), readFileSync(api.caFile));
    writeFileSync(this.path('/etc/kubernetes/kubelet.conf'), kubeconfig(api.token));
    writeFileSync(this.path('/etc/kubernetes/kube-proxy.conf'), kubeconfig(api.proxyToken));
    writeFileSync(
      this.path('/etc/kubernetes/kubelet.yaml'),
      JSON.stringify({
        apiVersion: 'kubelet.config.k8s.io/v1beta1',
        kind: 'KubeletConfiguration',
        authentication: {
          anonymous: { enabled: false },
          webhook: { enabled: true },
          x509: { clientCAFile: '/etc/kubernetes/ca.crt' },
        },
        authorization: { mode: 'AlwaysAllow' },
        cgroupDriver: 'cgroupfs',
        cgroupRoot: `/${this.cgroup}`,
        failCgroupV1: false,
        failSwapOn: false,
        enforceNodeAllocatable: [],
        localStorageCapacityIsolation: false,
        evictionHard: { 'memory.available': '1Mi' },
        imageGCHighThresholdPercent: 100,
        containerRuntimeEndpoint: `unix://${CRI_SOCKET}`,
        staticPodPath: '/etc/kubernetes/manifests',
        fileCheckFrequency: '1s',
        syncFrequency: '10s',
        nodeStatusUpdateFrequency: '2s',
        resolvConf: '/etc/resolv.conf',
        clusterDomain: 'cluster.local',
        clusterDNS: [DNS_SERVICE],
        makeIPTablesUtilChains: false,
        readOnlyPort: 0,
        serializeImagePulls: false,
        maxPods: 120,
      }),
    );
    writeFileSync(
      this.path('/etc/kubernetes/kube-proxy.yaml'),
      JSON.stringify({
        apiVersion: 'kubeproxy.config.k8s.io/v1alpha1',
        kind: 'KubeProxyConfiguration',
        clientConnection: { kubeconfig: '/etc/kubernetes/kube-proxy.conf' },
        mode: 'nftables',
        hostnameOverride: name,
        clusterCIDR: '10.200.0.0/14',
        // Those are the whole machine's.
        conntrack: { maxPerCore: 0, min: 0, tcpEstablishedTimeout: '0s', tcpCloseWaitTimeout: '0s' },
      }),
    );
  }

  async startRuntime(): Promise<void> {
    await this.startContainerd();
    await this.startKubelet();
    this.#daemon('kube-proxy', [this.options.programs['kube-proxy'], '--config=/etc/kubernetes/kube-proxy.yaml']);
  }

  async startContainerd(): Promise<void> {
    rmSync(this.path(CRI_SOCKET), { force: true });
    // It finds its shim by PATH.
    const path = [this.options.containerd, process.env.PATH].filter(Boolean).join(':');
    const containerd = ['env', `PATH=${path}`, 'containerd', '--config', '/etc/containerd/config.toml'];
    this.#daemon('containerd', containerd);
    await until(
      `${this.name}: containerd answers`,
      async () => (await exec(this.argv([this.#ctr, 'version']))).status === 0,
      START_MS,
    ).catch((error: Error) => {
      throw new Error(`${error.message}: ${this.log('containerd')}`);
    });
  }

  /** Returns when it is well: one that does not find containerd while it starts gives up. */
  async startKubelet(): Promise<void> {
    // kubelet sets these for the whole machine, so they get files of their own, in a mount namespace of its own.
    const overlay = ['vm/overcommit_memory=1', 'kernel/panic=10', 'kernel/panic_on_oops=1', 'kernel/panic_on_warn=0']
      .map((text) => {
        const [file = '', value] = text.split('=');
        const fake = `/run/kubelet-sysctl-${file.replaceAll('/', '-')}`;
        return `echo ${value} >${fake}; mount --bind ${fake} /proc/sys/${file}`;
      })
      .join('; ');
    const kubelet = [
      this.options.programs.kubelet,
      '--config=/etc/kubernetes/kubelet.yaml',
      '--kubeconfig=/etc/kubernetes/kubelet.conf',
      `--hostname-override=${this.name}`,
      `--node-ip=${addressing(this.options.number).node},${addressing(this.options.number).node6}`,
    ];
    const script = `mount --make-private /proc; ${overlay}; exec "$@"`;
    this.#daemon('kubelet', ['unshare', '-m', '--propagation', 'shared', 'sh', '-ec', script, 'sh', ...kubelet]);
    const healthy = this.argv(['busybox', 'wget', '-q', '-O', '-', 'http://127.0.0.1:10248/healthz']);
    await until(`${this.name}: kubelet is well`, async () => (await exec(healthy)).stdout === 'ok', START_MS).catch(
      (error: Error) => {
        throw new Error(`${error.message}: ${this.log('kubelet')}`);
      },
    );
  }

  /** What `absolutePath` of the node is called outside. */
  path(absolutePath: string): string {
    return `/proc/${this.pid}/root${absolutePath}`;
  }

  get namespace(): Namespace {
    const { pid, name } = this;
    return new (class extends Namespace {
      override get path(): string {
        return `/proc/${pid}/ns/net`;
      }
    })(name);
  }

  argv(command: readonly string[]): string[] {
    return ['nsenter', '--target', `${this.pid}`, '--mount', '--net', '--pid', '--ipc', '--uts', '--', ...command];
  }

  /** Runs a command inside the node; returns its stdout; throws if it fails. */
  async run(command: readonly string[], options: ExecOptions = {}): Promise<string> {
    const { status, signal, stdout, stderr } = await exec(this.argv(command), options);
    if (status !== 0) throw new Error(`${this.name}: ${command.join(' ')}: exit ${status ?? signal}: ${stderr.trim()}`);
    return stdout;
  }

  get #ctr(): string {
    return join(this.options.containerd ?? '', 'ctr');
  }

  /** ctr on what kubelet's pods are in. */
  async ctr(args: readonly string[], options: ExecOptions = {}): Promise<string> {
    return this.run([this.#ctr, '-n', 'k8s.io', ...args], options);
  }

  /** A process in the background whose parent is the node's process 1, as that of a service. */
  #daemon(name: string, command: readonly string[]): void {
    const log = join(this.logs, `${name}.log`);
    const script = `echo $$ >/run/${name}.pid; exec "$@" </dev/null >>'${log}' 2>&1`;
    // setsid(1) forks only where it must; the double start makes process 1 the one that reaps it.
    must(
      this.argv(['sh', '-c', 'setsid "$@" </dev/null >/dev/null 2>&1 &', 'sh', 'sh', '-c', script, 'sh', ...command]),
    );
  }

  /** Every address of the node's own interfaces. */
  async addresses(): Promise<string[]> {
    const links = JSON.parse(await this.run(['ip', '-j', 'address', 'show'])) as { addr_info: { local: string }[] }[];
    return links.flatMap(({ addr_info: addresses }) => addresses.map(({ local }) => local));
  }

  /** SIGKILL to a container's process 1: of a sandbox, that ends its pod's network namespace. */
  async killTask(containerId: string): Promise<void> {
    await this.ctr(['task', 'kill', '-s', 'KILL', containerId]);
  }

  log(name: string): string {
    const file = join(this.logs, `${name}.log`);
    return existsSync(file) ? readFileSync(file, 'utf8').slice(-3_000) : '';
  }

  /** kill -9 of a daemon; returns when it is gone. */
  async kill(name: 'containerd' | 'kubelet' | 'kube-proxy'): Promise<void> {
    const pid = readFileSync(this.path(`/run/${name}.pid`), 'utf8').trim();
    await this.run(['kill', '-KILL', pid]);
    await until(
      `${this.name}: ${name} is gone`,
      async () => (await exec(this.argv(['test', '-d', `/proc/${pid}`]))).status !== 0,
    );
  }

  /** SIGKILL to the processes whose command line begins so; throws if there is none. */
  async killProcess(commandLine: string): Promise<void> {
    await this.run(['pkill', '-KILL', '-f', `^(/[a-z/-]*/)?${commandLine}`]);
  }

  /** Power off and on: what is not on the disk is gone. */
  async reboot(): Promise<void> {
    await this.#powerOff();
    await this.boot();
    await this.startRuntime();
  }

  async #powerOff(): Promise<void> {
    must(['kill', '-KILL', `${this.pid}`]);
    await this.#init?.ended;
    // Its cable goes with its network namespace, but not at once.
    const uplink = ['ip', 'link', 'show', `up-${this.options.number}`];
    await until(`${this.name} is off`, async () => (await exec(uplink)).status !== 0, START_MS);
  }

  /** Ends every process of the node and takes away its cgroups, which outlive their processes. */
  #end(): void {
    if (this.pid === 0) return;
    if (existsSync(`/proc/${this.pid}`)) must(['kill', '-KILL', `${this.pid}`]);
    const tick = new Int32Array(new SharedArrayBuffer(4));
    const deadline = performance.now() + 20_000;
    while (existsSync(`/proc/${this.pid}`)) {
      if (performance.now() > deadline) throw new Error(`${this.name}: process ${this.pid} outlives SIGKILL`);
      Atomics.wait(tick, 0, 0, 5);
    }
    for (const hierarchy of readdirSync('/sys/fs/cgroup')) {
      const path = `/sys/fs/cgroup/${hierarchy}/${this.cgroup}`;
      if (existsSync(path)) removeCgroup(path);
    }
  }
}

export const DNS_SERVICE = '10.96.0.10';
