// SPDX-License-Identifier: Apache-2.0
// What native/ exports. Types only: plugin/addon.ts loads the module. The structs behind these objects are
// bpf/redirect.h; the addon encodes and decodes them, so no byte offset appears in TypeScript.
//
// Every function is synchronous unless it returns a Promise, works on the calling thread and restores that thread's
// network namespace before it returns. A failing kernel call throws an Error with the fields of NativeError.
// A wrong argument throws a TypeError before any kernel call. `netns` arguments are descriptors from openNetns(), or
// HOST (-1) for the namespace the process runs in.

/** 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. */
export type Address = Uint8Array;
/** 32 bytes: SHA-256 over network name, container id, ifname. */
export type AttachmentKey = Uint8Array;
/** "02:00:5e:10:00:01" */
export type Mac = string;
export type Direction = 'ingress' | 'egress';
export type ProgramName =
  | 'pod_egress'
  | 'pod_ingress'
  | 'proxy_egress'
  | 'proxy_guard'
  | 'proxy_lookup'
  | 'proxy_ingress'
  | 'inpod_egress'
  | 'inpod_ingress'
  | 'inpod_lookup'
  | 'inpod_sign'
  | 'inpod_guard';
/** Programs in a pod's netns: what is attached there is a stub that goes on to them. */
export type JumpedTo = 'inpod_egress' | 'inpod_ingress' | 'inpod_lookup';
export const HOST = -1;

export interface NativeError extends Error {
  /** "EEXIST" */
  code: string;
  errno: number;
  /** the kernel call that failed: "bpf(BPF_LINK_CREATE)", "RTM_NEWQDISC", "setns", ... */
  syscall: string;
  /** only when loading programs failed */
  verifierLog?: string;
  /** the kernel's own words (netlink extended ack), if it said any */
  kernelMessage?: string;
}

export interface NetnsIdentity {
  dev: bigint;
  ino: bigint;
  /** SO_NETNS_COOKIE; 0n on kernels older than 5.14 */
  cookie: bigint;
}

export interface Link {
  ifindex: number;
  name: string;
  /** IFLA_INFO_KIND: "veth", "bridge", "macvlan", ...; "" for physical devices */
  kind: string;
  mac: Mac;
  mtu: number;
  up: boolean;
  /** IFLA_LINK; 0 if none */
  peerIfindex: number;
  /** IFLA_LINK_NETNSID; -1 if absent (peer in the same namespace or no peer) */
  peerNetnsId: number;
  /** IFLA_MASTER; 0 if none */
  master: number;
}

export interface LinkAddress {
  address: Address;
  /** prefix length in 128-bit space: an IPv4 /24 is 120 */
  prefix: number;
  /** RT_SCOPE_*: 0 universe, 200 site, 253 link, 254 host */
  scope: number;
}

export interface Qdisc {
  kind: string;
  handle: number;
  parent: number;
}

export interface TcFilter {
  kind: string;
  priority: number;
  protocol: number;
  handle: number;
  /** cls_bpf only, else 0 */
  programId: number;
  /** cls_bpf: TCA_BPF_NAME, else "" */
  name: string;
  directAction: boolean;
}

export interface TcxEntry {
  programId: number;
  linkId: number;
}

export interface BpfLinkInfo {
  kind: 'tcx' | 'netns';
  linkId: number;
  programId: number;
  /** 0 when the device is gone and the link is only a dead pin, and for a link to a namespace */
  ifindex: number;
  direction: Direction;
  /** of the namespace that a link of kind "netns" is attached to; 0n when it is gone, and for the other kind */
  netnsIno: bigint;
}

export interface ProgramInfo {
  id: number;
  name: string;
  /** 16 hex digits */
  tag: string;
  /** instructions that the verifier went through; 0 where the kernel does not say (before 5.16) */
  verified: number;
}

export interface StateSettings {
  layout: number;
  maxPods: number;
  maxFlows: number;
  directFlowsPerPod: number;
  marks: { bypass: number; toProxy: number; tproxy: number };
  /** VARIANT_* bits */
  variant: number;
  /** five bytes */
  sign: Uint8Array;
  bootId: string;
  /** the proxy's mark counts only on sockets of the cgroups that putProxyCgroup() named */
  checkCgroups: boolean;
}

/** What maps have room for. */
export type Capacity = Pick<StateSettings, 'maxPods' | 'maxFlows' | 'directFlowsPerPod'>;

/** Opened pins of one state directory; release with closeState(). */
export type State = { readonly __state: unique symbol };

export interface HookRecord {
  program: ProgramName;
  /** netns: socket lookup of the namespace; ifindex 0, direction without meaning */
  kind: 'tcx' | 'clsact' | 'netns';
  ifindex: number;
  direction: Direction;
  inNetns: boolean;
  programId: number;
  handle: number;
  priority: number;
}

export interface AttachmentRecord {
  /** version of the layout it was written with */
  layout: number;
  state: 'attaching' | 'attached' | 'recorded';
  role: 'none' | 'pod' | 'proxy';
  contract: 'shared' | 'in-pod';
  /** INTERFACE_* bits */
  flags: number;
  /** 0: there is no interface on the host's side */
  hostIfindex: number;
  podIfindex: number;
  nsid: number;
  /** key of the maps that programs look into; the host-side index where there is one */
  interfaceId: number;
  netns: NetnsIdentity;
  /** seconds since 1970 */
  enrolledAt: number;
  podMac: Mac;
  hostMac: Mac;
  /** "f0e1...-..." as in /proc/sys/kernel/random/boot_id */
  bootId: string;
  addresses: Address[];
  hooks: HookRecord[];
  programTag: string;
  hostIfname: string;
  ifname: string;
  network: string;
  containerId: string;
  podName: string;
  podNamespace: string;
  podUid: string;
  serviceAccount: string;
  netnsPath: string;
}

export interface InterfaceRecord {
  podMac: Mac;
  gatewayMac: Mac;
  flags: number;
  podIfindex: number;
  nsid: number;
  master: number;
  /** in-pod contract; else all 0 */
  ports: ListenerPorts;
  /** in-pod contract: the pod's first of each family; all zero: none */
  address4: Address;
  address6: Address;
}

export interface ListenerPorts {
  outbound: number;
  inboundPlaintext: number;
  inboundHBONE: number;
  dns: number;
}

export interface EndpointRecord {
  /** interface id */
  ifindex: number;
  flags: number;
  podMac: Mac;
}

export interface ProxyRecord {
  key: AttachmentKey;
  netnsCookie: bigint;
  netnsIno: bigint;
  hostIfindex: number;
  podIfindex: number;
  nsid: number;
  master: number;
  mac: Mac;
  ports: ListenerPorts;
}

export interface TraceEvent {
  /** CLOCK_MONOTONIC, nanoseconds */
  time: bigint;
  /** interface id; 0 for proxy_ingress */
  ifindex: number;
  program: ProgramName;
  reason: string;
  /** bytes, with the Ethernet header */
  length: number;
  /** 0: the packet was not parsed, and what follows says nothing */
  family: 0 | 4 | 6;
  /** TCP's; 0 for other packets */
  flags: number;
  /** IPPROTO_* */
  protocol: number;
  source: Address;
  destination: Address;
  sourcePort: number;
  destinationPort: number;
}

export interface Tuple {
  source: Address;
  sourcePort: number;
  destination: Address;
  destinationPort: number;
}

export interface TcpConnection {
  /** "established", "syn_recv", "fin_wait2", ... */
  state: string;
  local: Address;
  localPort: number;
  remote: Address;
  remotePort: number;
}

/** The longest prefix that matches decides. */
export interface ExclusionRule {
  kind: 'inbound_port' | 'outbound_port' | 'outbound_address';
  /** 16 bytes; of a port the first two, in network order */
  value: Uint8Array;
  /** significant bits of value: at most 16 for a port, 128 for an address */
  length: number;
  /** false: takes its part out of a shorter prefix */
  excluded: boolean;
}

export interface Counter {
  /** interface id; 0 for proxy_ingress */
  ifindex: number;
  program: ProgramName;
  reason: string;
  packets: bigint;
  bytes: bigint;
}

export interface Rule {
  family: 4 | 6;
  priority: number;
  /** compared whole: FRA_FWMASK 0xffffffff */
  mark: number;
  table: number;
  /** FRA_PROTOCOL */
  protocol: number;
}

export interface LocalRoute {
  family: 4 | 6;
  table: number;
  /** rtm_protocol */
  protocol: number;
}

export interface Listener {
  family: 4 | 6;
  /** textual address */
  address: string;
  port: number;
  /** family 6 only: false means it takes IPv4 too */
  v6only: boolean;
  /** undefined where the kernel does not tell (INET_DIAG_SOCKOPT, 5.10) */
  transparent: boolean | undefined;
  uid: number;
  inode: number;
  mark: number | undefined;
}

export interface Datagram {
  /** at most 64 KiB */
  bytes: Uint8Array;
  /** the caller's from now on */
  fds: number[];
  /** longer than that, or with more descriptors than this process may have: what is here is not all of it */
  truncated: boolean;
}

export interface Native {
  /** LAYOUT_VERSION the addon was built with */
  readonly layoutVersion: number;
  /** identifies the built BPF object: 16 hex digits of its SHA-256 */
  readonly objectId: string;
  /** every reason and program word, by number: ties TypeScript to redirect.h */
  readonly reasons: Readonly<Record<string, number>>;
  readonly programs: Readonly<Record<ProgramName, number>>;
  /** struct sizes, for documentation and tests: {interface, endpoint, attachment, ...} */
  readonly sizes: Readonly<Record<string, number>>;
  /** INTERFACE_* and VARIANT_* of redirect.h under their full names */
  readonly flags: Readonly<Record<string, number>>;

  /** 64 hex digits. node:crypto would cost every start of the plugin 5 ms, for its streams. */
  sha256(bytes: Uint8Array): string;

  // --- descriptors, files, namespaces -------------------------------------------------------------------------
  close(fd: number): void;
  /** open(path, O_RDONLY|O_CLOEXEC) and NS_GET_NSTYPE; EINVAL if it is not a network namespace */
  openNetns(path: string): number;
  netnsIdentity(netns: number): NetnsIdentity;
  /** nsid of `netns` as seen from the process's namespace; allocates one if there is none and `allocate`; else -1 */
  netnsId(netns: number, allocate: boolean): number;
  /** flock(LOCK_EX) on a file created 0600; waits at most timeoutMs, then ETIMEDOUT. Released by close(). */
  lockFile(path: string, timeoutMs: number): number;
  /** the same with LOCK_SH */
  lockShared(path: string, timeoutMs: number): number;
  /** statfs magic is BPF_FS_MAGIC; false if path does not exist */
  isBpffs(path: string): boolean;
  mountBpffs(path: string): void;
  /** mkdir; false if it was there already */
  makeDirectory(path: string, mode: number): boolean;
  removeDirectory(path: string): boolean;
  /** unlink; false if it was not there */
  removeFile(path: string): boolean;
  /** rename; what was at `to` is replaced */
  renameFile(from: string, to: string): void;
  /** effective capabilities of this thread, as a bit set (capget) */
  capabilities(): bigint;

  // --- links (rtnetlink) ---------------------------------------------------------------------------------------
  linkByName(netns: number, name: string): Link | null;
  linkByIndex(netns: number, ifindex: number): Link | null;
  linkAddresses(netns: number, ifindex: number): LinkAddress[];
  /** net.ipv4.conf.DEVICE.accept_local: packets with a source address of this namespace are taken from outside */
  acceptLocal(netns: number, ifindex: number): boolean;
  setAcceptLocal(netns: number, ifindex: number, on: boolean): void;
  /** net.ipv4.conf.DEVICE.route_localnet: 127/8 may come in and go out by it */
  routeLocalnet(netns: number, ifindex: number): boolean;
  setRouteLocalnet(netns: number, ifindex: number, on: boolean): void;
  /**
   * net.ipv4.tcp_migrate_req of the whole namespace: connections that wait for a listener which goes are handed to
   * another one of its SO_REUSEPORT group instead of being reset. null: the kernel is older than 5.14.
   */
  migrateRequests(netns: number): boolean | null;
  /** Throws ENOENT where migrateRequests() is null. */
  setMigrateRequests(netns: number, on: boolean): void;
  qdiscs(netns: number, ifindex: number): Qdisc[];

  // --- routing in the proxy's netns; existing identical entries are not an error (returns false) -----------------
  addRule(netns: number, rule: Rule): boolean;
  /** deletes only a rule that matches in every field; false if there is none */
  deleteRule(netns: number, rule: Rule): boolean;
  rules(netns: number, family: 4 | 6): Rule[];
  /** local default (0.0.0.0/0 or ::/0) dev lo in `table` */
  addLocalRoute(netns: number, route: LocalRoute): boolean;
  deleteLocalRoute(netns: number, route: LocalRoute): boolean;
  localRoutes(netns: number, family: 4 | 6, table: number): LocalRoute[];

  // --- state directory -------------------------------------------------------------------------------------------
  /** Creates and pins every map that is missing under dir (which exists, on bpffs), settings last. Caller holds the lock. */
  createState(dir: string, wanted: Omit<StateSettings, 'layout' | 'sign' | 'bootId' | 'checkCgroups'>): void;
  /**
   * Opens the pins. ENOENT: no (complete) state there. EPROTO: layout of another version or a map of another shape;
   * message names found and wanted.
   */
  openState(dir: string): State;
  /** The same, with the maps that are pinned in `over` in the place of those in `dir`. */
  openStateOver(dir: string, over: string): State;
  /**
   * Pins in `dir` new maps for those of `state` that have not the room wanted; their names. All are empty but
   * "settings", which is always among them and says the sizes wanted. EEXIST: a pin is there already.
   */
  growState(state: State, dir: string, wanted: Capacity): string[];
  /** Attachments, interfaces, endpoints and exclusions of `to` become those of `from`, where the maps are not the same. */
  copyRecords(from: State, to: State): void;
  /** Flows through a proxy; entries that `to` has already stay. */
  copyFlows(from: State, to: State): void;
  /** Counters and, unless `directFlowsPerPod` differs, direct flows of one interface, or counters of 0; entries that `to` has already stay. */
  copyTraffic(from: State, to: State, ifindex: number): void;
  /** settings.maxPods becomes what the maps have room for */
  writeCapacity(state: State): void;
  closeState(state: State): void;
  settings(state: State): StateSettings;

  getAttachment(state: State, key: AttachmentKey): AttachmentRecord | null;
  /** E2BIG when the map is full */
  putAttachment(state: State, key: AttachmentKey, record: AttachmentRecord): void;
  /** BPF_EXIST; false: no such record, and none is made */
  replaceAttachment(state: State, key: AttachmentKey, record: AttachmentRecord): boolean;
  deleteAttachment(state: State, key: AttachmentKey): boolean;
  listAttachments(state: State): { key: AttachmentKey; record: AttachmentRecord }[];

  getInterface(state: State, ifindex: number): InterfaceRecord | null;
  putInterface(state: State, ifindex: number, record: InterfaceRecord): void;
  deleteInterface(state: State, ifindex: number): boolean;
  listInterfaces(state: State): { ifindex: number; record: InterfaceRecord }[];

  getEndpoint(state: State, address: Address): EndpointRecord | null;
  /** exclusive: BPF_NOEXIST, so EEXIST tells of a holder */
  putEndpoint(state: State, address: Address, record: EndpointRecord, exclusive: boolean): void;
  deleteEndpoint(state: State, address: Address): boolean;
  listEndpoints(state: State): { address: Address; record: EndpointRecord }[];

  getProxies(state: State): { generation: number; proxies: ProxyRecord[] };
  putProxies(state: State, generation: number, proxies: ProxyRecord[]): void;

  /** flows of the interface that were let go direct on purpose, the pod's end as source */
  directFlows(state: State, ifindex: number): Tuple[];
  /**
   * Adds one, by the pinned program direct_import; false: it has been redirected meanwhile, and is left so. ENOMEM: the
   * kernel has no memory for it. It may take the place of another one (see directFlows).
   */
  importDirectFlow(programFd: number, ifindex: number, flow: Tuple): boolean;
  /** how many sets of flows there were */
  deleteDirectFlows(state: State, ifindex: number): number;
  /** Entries of flows through a proxy that are of this interface; how many there were. One that is written meanwhile may stay. */
  deleteFlows(state: State, ifindex: number): number;
  /** interfaces that have such flows, or had */
  listDirectFlows(state: State): number[];

  /**
   * Replaces all exclusions of an interface at once: a program sees the old rules or these. E2BIG: more than 4096 rules,
   * or the map of pods is full.
   */
  putExclusions(state: State, ifindex: number, rules: readonly ExclusionRule[]): void;
  deleteExclusions(state: State, ifindex: number): boolean;
  /** [] if there are none */
  getExclusions(state: State, ifindex: number): ExclusionRule[];
  /** interfaces that have exclusions */
  listExclusions(state: State): number[];

  /** In-pod contract: does PROXY_MARK (0x539) need a socket of a known cgroup to count? From the next packet on. */
  setCheckCgroups(state: State, on: boolean): void;
  /** `id`: of a v2 cgroup, which is its directory's inode number. E2BIG: more than 64 */
  putProxyCgroup(state: State, id: bigint): void;
  deleteProxyCgroup(state: State, id: bigint): boolean;
  listProxyCgroups(state: State): bigint[];

  counters(state: State): Counter[];
  /** forgets an interface's counters */
  deleteCounters(state: State, ifindex: number): number;
  /** What the programs report as events; null: nothing. Sets the number of lost ones to 0. */
  setTrace(state: State, filter: { ifindex: number; reason: string | null } | null): void;
  /** `lost`: events that found the buffer full since setTrace */
  getTrace(state: State): { on: boolean; lost: number };
  /**
   * Calls `onEvents` whenever the programs have reported, until the returned function is called; keeps the process
   * alive until then. What is in the buffer at the call is thrown away. One reader at a time.
   */
  followEvents(state: State, onEvents: (events: TraceEvent[]) => void): () => void;
  /** per map: entries in use, capacity, bytes as the kernel accounts them (fdinfo memlock); inner maps summed */
  mapUsage(state: State): { map: string; entries: number; capacity: number; bytes: number }[];

  // --- programs ------------------------------------------------------------------------------------------------
  /** Loads all programs against the pinned maps of `state` and pins them under dir/programs/<tag>/NAME. Caller holds the lock. */
  loadPrograms(state: State, dir: string, tag: string): void;
  /** The same, but stubs go on to what they went on to before. */
  loadIdlePrograms(state: State, dir: string, tag: string): void;
  /** Stubs go on to those programs of dir/programs/TAG from now on. Waits as waitForPrograms() before the last one. */
  jumpToPrograms(state: State, directory: string): void;
  /** Returns when no program runs any more that was replaced before the call: a grace period, some 10 ms. */
  waitForPrograms(): void;
  /**
   * A new stub for one hook of a pod's netns, not pinned: the caller attaches and closes it. `otherwise`: what it does
   * with packets when its target is gone, which is when the state directory is.
   */
  loadStub(state: State, program: JumpedTo, interfaceId: number, otherwise: 'pass' | 'drop'): number;
  /** id of the program that stubs go on to now; 0: none, this kernel or variant has no such programs */
  jumpTarget(state: State, program: JumpedTo): number;
  /** BPF_OBJ_GET of a program pin; ENOENT if absent */
  openProgram(path: string): number;
  programInfo(programFd: number): ProgramInfo;
  /** null if no program has that id (any more) */
  programById(id: number): ProgramInfo | null;
  /**
   * BPF_PROG_TEST_RUN with data_in = packet (Ethernet), optional __sk_buff fields. `interfaceId` is in cb[0], before and
   * after.
   */
  testRun(
    programFd: number,
    packet: Uint8Array,
    skb?: { mark?: number; ingressIfindex?: number; ifindex?: number; repeat?: number; interfaceId?: number },
  ): { verdict: number; packet: Uint8Array; mark: number; interfaceId: number; nanoseconds: number };

  // --- hooks -----------------------------------------------------------------------------------------------------
  /** BPF_LINK_CREATE (first: BPF_F_BEFORE, last: BPF_F_AFTER) and BPF_OBJ_PIN; undone if the pin fails. EINVAL/EOPNOTSUPP below 6.6 */
  attachTcx(
    netns: number,
    ifindex: number,
    direction: Direction,
    programFd: number,
    order: 'first' | 'last',
    pinPath: string,
  ): { linkId: number };
  /**
   * The same on another thread, for the agent: both wait for an RCU grace period. The descriptors must stay open until it
   * settles; only arguments throw.
   */
  attachTcxAside(
    netns: number,
    ifindex: number,
    direction: Direction,
    programFd: number,
    order: 'first' | 'last',
    pinPath: string,
  ): Promise<{ linkId: number }>;
  /** BPF_LINK_CREATE of a socket lookup program for a namespace, and BPF_OBJ_PIN. EINVAL below 5.9 */
  attachLookup(netns: number, programFd: number, pinPath: string): { linkId: number };
  queryTcx(netns: number, ifindex: number, direction: Direction): TcxEntry[];
  /** of a pinned link; null if the pin is absent */
  linkInfo(pinPath: string): BpfLinkInfo | null;
  /** BPF_LINK_UPDATE */
  updateLink(pinPath: string, programFd: number): void;
  /** BPF_LINK_DETACH (tolerates a dead device) and unlink; false if the pin is absent */
  detachLink(pinPath: string): boolean;
  /** on another thread */
  detachLinkAside(pinPath: string): Promise<boolean>;
  /** RTM_NEWQDISC clsact; false if a clsact is there; EBUSY with kernelMessage when an ingress qdisc holds the place */
  addClsact(netns: number, ifindex: number): boolean;
  filters(netns: number, ifindex: number, direction: Direction): TcFilter[];
  /** cls_bpf, direct action, ETH_P_ALL, NLM_F_CREATE|NLM_F_EXCL unless replace */
  attachFilter(
    netns: number,
    ifindex: number,
    direction: Direction,
    programFd: number,
    filter: { priority: number; handle: number; name: string; replace: boolean },
  ): void;
  /** whatever bpf filter has that place: the caller proves first, by filters(), that it is ours; false if none is there */
  deleteFilter(
    netns: number,
    ifindex: number,
    direction: Direction,
    filter: { priority: number; handle: number },
  ): boolean;

  // --- sockets ---------------------------------------------------------------------------------------------------
  /** listening TCP sockets of a netns (sock_diag) */
  listeners(netns: number): Listener[];
  /** TCP sockets of a netns (sock_diag) that are neither listening nor closed nor in TIME_WAIT */
  connections(netns: number): TcpConnection[];
  /** IP_TRANSPARENT listener, non-blocking, for net.Server.listen({fd}); closed by its owner */
  listenTransparent(
    netns: number,
    options: {
      family: 4 | 6;
      address: string;
      port: number;
      backlog: number;
      reusePort: boolean;
      v6only: boolean;
      mark: number;
    },
  ): number;
  /** connects from a source address that may be foreign (IP_TRANSPARENT); resolves with the connected descriptor */
  connectTransparent(
    netns: number,
    options: {
      source: string | null;
      sourcePort: number;
      destination: string;
      port: number;
      mark: number;
      timeoutMs: number;
    },
  ): Promise<number>;
  /** an ordinary TCP listener inside another netns, non-blocking, for net.Server.listen({fd}) */
  listenPlain(
    netns: number,
    options: { address: string; port: number; backlog: number; reusePort?: boolean; mark?: number },
  ): number;
  /** a bound UDP socket inside another netns, for dgram's bind({fd}) */
  listenDatagram(netns: number, options: { address: string; port: number; reusePort: boolean; mark: number }): number;

  // --- datagrams between processes: AF_UNIX, SOCK_SEQPACKET; every descriptor is non-blocking and CLOEXEC ---------------
  /** bind() and listen(). EADDRINUSE: something has that path, a socket that nobody serves any more too */
  listenSeqpacket(path: string, options: { mode: number; backlog: number }): number;
  /** null: nobody waits */
  acceptSeqpacket(listener: number): number | null;
  /** ECONNREFUSED: nobody listens there; EAGAIN: too many wait; EPROTOTYPE: it is a socket of another type */
  connectSeqpacket(path: string): number;
  /** the process at the other end, as it was when it connected or listened (SO_PEERCRED) */
  peerCredentials(socket: number): { pid: number; uid: number; gid: number };
  /** with at most 253 descriptors (SCM_RIGHTS), which stay the caller's; false: the other end has to read first */
  sendDatagram(socket: number, bytes: Uint8Array, fds: readonly number[]): boolean;
  /** "nothing": there is none now; "closed": there will be none any more */
  receiveDatagram(socket: number): Datagram | 'nothing' | 'closed';
  /** Readable when links of the process's namespace, their qdiscs or filters have come, gone or changed. Release with close(). */
  openLinkEvents(): number;
  /** Indexes of those links since the last call, each once; null: some were lost (ENOBUFS), anything may have changed. */
  readLinkEvents(socket: number): number[] | null;
  /**
   * Calls `onReadable` while there is something to read, or the end, until the returned function is called, which has to
   * be before close(fd). Keeps the process alive. EEXIST: watched already; EPERM: not that kind of descriptor
   */
  watchReadable(fd: number, onReadable: () => void): () => void;

  // --- kernel ------------------------------------------------------------------------------------------------------
  /** by doing, never by version: {tcx, redirectPeer, skAssign, skLookup, skcLookup, checkMtu, tcpCheckSyncookie, netnsCookie, btf} */
  features(): Record<string, boolean>;

  // --- only in the fault-injecting build ------------------------------------------------------------------------------
  /** the n-th kernel call from now on (1-based) fails with `errno`; 0 switches off; kernelCalls() counts */
  failKernelCall?(n: number, errno: number): void;
  kernelCalls?(): string[];
}
