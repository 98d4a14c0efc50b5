// SPDX-License-Identifier: Apache-2.0
//
// etcd and kube-apiserver of a test file: real ones, on loopback ports of their own, with a CA, a token file and RBAC,
// everything in one temporary directory. Pods and namespaces are made through the API; there is no kubelet, scheduler
// or controller manager, so nothing happens to them that a test does not do.

import { createSign, generateKeyPairSync, type KeyObject, randomUUID } from 'node:crypto';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { request } from 'node:https';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { Api } from '../../plugin/agent/kubernetes/api.ts';
import { must, type Running, type Testbed, until } from '../netns.ts';
import { controlPlanePrograms } from './build.ts';

type Body = Record<string, unknown>;

export interface PodSpec {
  namespace: string;
  name: string;
  node: string;
  labels?: Record<string, string>;
  annotations?: Record<string, string>;
  serviceAccount?: string;
  hostNetwork?: boolean;
  ownerReferences?: Body[];
}

/** For a cluster with nodes of its own kubelets: reached by them, and reaching them. */
export interface ForNodes {
  /** of this machine or network namespace, besides 127.0.0.1 */
  address: string;
  /** who else may come, beside the test itself */
  tokens: readonly { token: string; user: string; groups: string }[];
}

/** First address of --service-cluster-ip-range: what pods reach the API server at. */
export const API_SERVICE = '10.96.0.1';

const START_TIMEOUT_MS = 60_000;
const ADMIN = { token: 'admin-token', user: 'admin', groups: 'system:masters' };
const ISSUER = 'https://kubernetes.default.svc';

export class ControlPlane {
  readonly directory: string;
  /** PEM of the CA that signed the server's certificate */
  readonly caFile: string;
  /** certificate for localhost and 127.0.0.1, for whatever stands in front of the API server */
  readonly server: { certFile: string; keyFile: string };
  readonly admin: Api;
  readonly adminTokenFile: string;
  readonly #testbed: Testbed;
  readonly #programs: { apiServer: string; etcd: string };
  readonly #accounts: KeyObject;
  readonly #ports: { etcd: number; peer: number; api: number };
  readonly #nodes: ForNodes | undefined;
  #etcd: Running | undefined;
  #apiServer: Running | undefined;

  private constructor(
    testbed: Testbed,
    programs: { apiServer: string; etcd: string },
    ports: { etcd: number; peer: number; api: number },
    nodes: ForNodes | undefined,
  ) {
    this.#testbed = testbed;
    this.#nodes = nodes;
    this.#programs = programs;
    this.#ports = ports;
    this.directory = testbed.directory('control-plane');
    const { ca, cert, key } = makeCertificates(this.directory, nodes?.address);
    this.caFile = ca;
    this.server = { certFile: cert, keyFile: key };
    const accounts = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    this.#accounts = accounts.privateKey;
    writeFileSync(this.#file('accounts.key'), accounts.privateKey.export({ type: 'pkcs8', format: 'pem' }));
    writeFileSync(this.#file('accounts.pub'), accounts.publicKey.export({ type: 'spki', format: 'pem' }));
    const tokens = [ADMIN, ...(nodes?.tokens ?? [])];
    const rows = tokens.map(({ token, user, groups }) => `${token},${user},${user},"${groups}"\n`);
    writeFileSync(this.#file('tokens.csv'), rows.join(''), { mode: 0o600 });
    this.adminTokenFile = this.#file('admin.token');
    writeFileSync(this.adminTokenFile, ADMIN.token);
    this.admin = new Api({ server: this.url, caFile: this.caFile, tokenFile: this.adminTokenFile });
    testbed.defer(() => this.admin.close());
  }

  /** Ready when it returns. */
  static async start(testbed: Testbed, nodes?: ForNodes): Promise<ControlPlane> {
    const [etcd = 0, peer = 0, api = 0] = await freePorts(3);
    const plane = new ControlPlane(testbed, await controlPlanePrograms(), { etcd, peer, api }, nodes);
    plane.startEtcd();
    await plane.startApiServer();
    return plane;
  }

  get url(): string {
    return `https://127.0.0.1:${this.#ports.api}`;
  }

  get port(): number {
    return this.#ports.api;
  }

  /** What signs tokens of service accounts, for the controller that makes them. */
  get accountsKeyFile(): string {
    return this.#file('accounts.key');
  }

  get apiServerPid(): number {
    if (this.#apiServer === undefined) throw new Error('the API server is not started');
    return this.#apiServer.pid;
  }

  startEtcd(): void {
    const client = `http://127.0.0.1:${this.#ports.etcd}`;
    const peer = `http://127.0.0.1:${this.#ports.peer}`;
    this.#etcd = this.#start([
      this.#programs.etcd,
      `--data-dir=${this.#file('etcd')}`,
      `--listen-client-urls=${client}`,
      `--advertise-client-urls=${client}`,
      `--listen-peer-urls=${peer}`,
      `--initial-advertise-peer-urls=${peer}`,
      `--initial-cluster=default=${peer}`,
      // A test's data need not survive the machine.
      '--unsafe-no-fsync',
      '--log-level=error',
    ]);
  }

  async startApiServer(): Promise<void> {
    mkdirSync(this.#file('cert-dir'), { recursive: true });
    const apiServer = this.#start([
      this.#programs.apiServer,
      `--etcd-servers=http://127.0.0.1:${this.#ports.etcd}`,
      `--secure-port=${this.#ports.api}`,
      `--cert-dir=${this.#file('cert-dir')}`,
      `--tls-cert-file=${this.server.certFile}`,
      `--tls-private-key-file=${this.server.keyFile}`,
      `--token-auth-file=${this.#file('tokens.csv')}`,
      `--service-account-issuer=${ISSUER}`,
      `--service-account-key-file=${this.#file('accounts.pub')}`,
      `--service-account-signing-key-file=${this.#file('accounts.key')}`,
      '--service-cluster-ip-range=10.96.0.0/16',
      ...this.#towardsNodes(),
      // Tests send what a whole node with a storm of pods would, and more.
      '--max-requests-inflight=2000',
      '--max-mutating-requests-inflight=1000',
      '-v=0',
    ]);
    this.#apiServer = apiServer;
    const limit = performance.now() + START_TIMEOUT_MS;
    const ready = async () => {
      if (!apiServer.alive) throw new Error(`kube-apiserver ended: ${apiServer.output.slice(-2_000)}`);
      // "ok" in plain text is no JSON: readiness is when the API answers, RBAC's own roles and the namespaces included.
      return Promise.all([
        this.admin.get('/api/v1/namespaces/default'),
        this.admin.get('/apis/rbac.authorization.k8s.io/v1/clusterroles/view'),
      ]).then(
        (found) => found.every((one) => one !== null),
        () => false,
      );
    };
    await until('kube-apiserver answers', ready, limit - performance.now());
  }

  #towardsNodes(): string[] {
    if (this.#nodes === undefined) {
      return [
        '--bind-address=127.0.0.1',
        '--advertise-address=127.0.0.1',
        '--authorization-mode=RBAC',
        // There is no controller that would make the default service accounts.
        '--disable-admission-plugins=ServiceAccount',
        '--endpoint-reconciler-type=none',
      ];
    }
    return [
      '--bind-address=0.0.0.0',
      `--advertise-address=${this.#nodes.address}`,
      '--authorization-mode=Node,RBAC',
      '--allow-privileged=true',
      `--kubelet-client-certificate=${this.server.certFile}`,
      `--kubelet-client-key=${this.server.keyFile}`,
      // Else logs and exec look the node's name up in DNS.
      '--kubelet-preferred-address-types=InternalIP',
    ];
  }

  /** SIGKILL, as a node's failure does. */
  async killApiServer(): Promise<void> {
    await this.#apiServer?.stop('SIGKILL');
  }

  async stop(): Promise<void> {
    await this.#apiServer?.stop('SIGKILL');
    await this.#etcd?.stop('SIGKILL');
  }

  // ---- objects ---------------------------------------------------------------------------------------------------

  async createNamespace(name: string, labels: Record<string, string> = {}): Promise<void> {
    await this.admin.create('/api/v1/namespaces', { metadata: { name, labels } });
  }

  /** null removes a label. */
  async label(path: string, labels: Record<string, string | null>): Promise<void> {
    await this.admin.mergePatch(path, { metadata: { labels } });
  }

  /** A pod that is bound to a node, as the scheduler leaves it; returns its UID. */
  async createPod(pod: PodSpec): Promise<string> {
    const { namespace, name, node, labels, annotations, serviceAccount, hostNetwork, ownerReferences } = pod;
    const created = await this.admin.create(`/api/v1/namespaces/${namespace}/pods`, {
      metadata: { name, labels, annotations, ownerReferences },
      spec: {
        nodeName: node,
        hostNetwork,
        serviceAccountName: serviceAccount ?? 'default',
        terminationGracePeriodSeconds: 0,
        containers: [{ name: 'app', image: 'app' }],
      },
    });
    return (created.metadata as { uid: string }).uid;
  }

  /** What kubelet reports. */
  async setPodStatus(namespace: string, name: string, phase: string, ips: readonly string[]): Promise<void> {
    await this.admin.mergePatch(`/api/v1/namespaces/${namespace}/pods/${name}/status`, {
      status: { phase, podIP: ips[0], podIPs: ips.map((ip) => ({ ip })) },
    });
  }

  /** For good: what the namespace controller does when everything in it is gone. */
  async removeNamespace(name: string): Promise<void> {
    const path = `/api/v1/namespaces/${name}`;
    await this.remove(path);
    const object = await this.admin.get(path);
    if (object === null) return;
    await this.#send('PUT', `${path}/finalize`, { ...object, spec: { finalizers: [] } });
  }

  /** DELETE, which the agent never sends. */
  async remove(path: string, options: Body = {}): Promise<void> {
    await this.#send('DELETE', path, { kind: 'DeleteOptions', apiVersion: 'v1', ...options });
  }

  async #send(method: string, path: string, object: Body): Promise<void> {
    const body = JSON.stringify(object);
    const headers = {
      authorization: `Bearer ${ADMIN.token}`,
      'content-type': 'application/json',
      'content-length': Buffer.byteLength(body),
    };
    const status = await new Promise<number | undefined>((resolve, reject) => {
      const sent = request(new URL(path, this.url), { method, ca: readFileSync(this.caFile), headers }, (got) =>
        got.resume().once('end', () => resolve(got.statusCode)),
      );
      sent.once('error', reject).end(body);
    });
    if (status !== 200 && status !== 202) throw new Error(`${method} ${path}: ${status}`);
  }

  async pod(namespace: string, name: string): Promise<Body | null> {
    return this.admin.get(`/api/v1/namespaces/${namespace}/pods/${name}`);
  }

  async annotation(namespace: string, name: string, key: string): Promise<string | undefined> {
    const pod = await this.pod(namespace, name);
    return (pod?.metadata as { annotations?: Record<string, string> } | undefined)?.annotations?.[key];
  }

  /** A service account; returns its UID. */
  async createServiceAccount(namespace: string, name: string): Promise<string> {
    const made = await this.admin.create(`/api/v1/namespaces/${namespace}/serviceaccounts`, { metadata: { name } });
    return (made.metadata as { uid: string }).uid;
  }

  /** A token of a service account as the API server itself would make it, good for `seconds` from now. */
  serviceAccountToken(namespace: string, name: string, uid: string, seconds: number): string {
    const now = Math.floor(Date.now() / 1000);
    const encode = (part: Body) => Buffer.from(JSON.stringify(part)).toString('base64url');
    const head = encode({ alg: 'ES256', typ: 'JWT' });
    const claims = encode({
      iss: ISSUER,
      aud: [ISSUER],
      sub: `system:serviceaccount:${namespace}:${name}`,
      iat: now - 3600,
      nbf: now - 3600,
      exp: now + seconds,
      jti: randomUUID(),
      'kubernetes.io': { namespace, serviceaccount: { name, uid } },
    });
    const signer = createSign('SHA256').update(`${head}.${claims}`);
    const signature = signer.sign({ key: this.#accounts, dsaEncoding: 'ieee-p1363' }).toString('base64url');
    return `${head}.${claims}.${signature}`;
  }

  // ----------------------------------------------------------------------------------------------------------------

  #file(name: string): string {
    return join(this.directory, name);
  }

  #start(argv: readonly string[]): Running {
    return this.#testbed.start(argv);
  }
}

/** A CA and a certificate of it, by openssl(1): Node signs no certificates. */
function makeCertificates(directory: string, address: string | undefined): { ca: string; cert: string; key: string } {
  const file = (name: string) => join(directory, name);
  const [ca, caKey, cert, key] = [file('ca.crt'), file('ca.key'), file('server.crt'), file('server.key')] as const;
  const more = address === undefined ? '' : `,DNS:kubernetes.default.svc,IP:${API_SERVICE},IP:${address}`;
  const curve = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2'];
  must(['openssl', 'req', '-x509', ...curve, '-subj', '/CN=test-ca', '-keyout', caKey, '-out', ca]);
  must(
    ['openssl', 'req', '-x509', ...curve, '-CA', ca, '-CAkey', caKey, '-subj', '/CN=kube-apiserver'].concat(
      ['-addext', `subjectAltName=DNS:localhost,IP:127.0.0.1${more}`, '-addext', 'basicConstraints=critical,CA:FALSE'],
      ['-keyout', key, '-out', cert],
    ),
  );
  return { ca, cert, key };
}

/** Ports of loopback that nobody uses at this moment. */
async function freePorts(count: number): Promise<number[]> {
  const servers = await Promise.all(
    Array.from({ length: count }, async () => {
      const server = createServer();
      await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
      return server;
    }),
  );
  const ports = servers.map((server) => (server.address() as { port: number }).port);
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
  return ports;
}
