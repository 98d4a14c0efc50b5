// SPDX-License-Identifier: Apache-2.0
import { fileURLToPath } from 'node:url';
import { type Client, credentials, loadPackageDefinition, type ServiceError } from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

/** The hand-written part of runtime.v1 that the client below speaks. */
export const runtimeV1Proto = fileURLToPath(new URL('./runtime-v1.proto', import.meta.url));

export type PodSandboxConfig = {
  metadata: { name: string; uid: string; namespace: string; attempt?: number };
  hostname?: string;
  log_directory?: string;
  port_mappings?: { protocol?: 'TCP' | 'UDP' | 'SCTP'; container_port: number; host_port: number; host_ip?: string }[];
  labels?: Record<string, string>;
  annotations?: Record<string, string>;
  linux?: {
    cgroup_parent?: string;
    security_context?: {
      namespace_options?: { network?: 'POD' | 'NODE'; pid?: 'POD' | 'CONTAINER' | 'NODE' };
      privileged?: boolean;
    };
  };
};

export type ContainerConfig = {
  metadata: { name: string; attempt?: number };
  image: { image: string };
  command?: string[];
  args?: string[];
  envs?: { key: string; value: string }[];
  mounts?: { container_path: string; host_path: string; readonly?: boolean; propagation?: MountPropagation }[];
  log_path?: string;
  linux?: { security_context: ContainerSecurity };
};

export type MountPropagation = 'PROPAGATION_PRIVATE' | 'PROPAGATION_HOST_TO_CONTAINER' | 'PROPAGATION_BIDIRECTIONAL';

export type ContainerSecurity = {
  capabilities?: { add_capabilities?: string[]; drop_capabilities?: string[] };
  privileged?: boolean;
  namespace_options?: { network?: 'POD' | 'NODE'; pid?: 'POD' | 'CONTAINER' | 'NODE' };
  run_as_user?: { value: number };
  readonly_rootfs?: boolean;
  no_new_privs?: boolean;
  seccomp?: { profile_type: 'RuntimeDefault' | 'Unconfined' };
};

export type PodSandboxStatus = {
  id: string;
  state: 'SANDBOX_READY' | 'SANDBOX_NOTREADY';
  network: { ip: string; additional_ips: { ip: string }[] } | null;
  annotations: Record<string, string>;
};

type Calls = {
  Version: [{ version?: string }, { runtime_name: string; runtime_version: string }];
  Status: [
    { verbose?: boolean },
    {
      status: { conditions: { type: string; status: boolean; reason: string; message: string }[] };
      info: Record<string, string>;
    },
  ];
  RunPodSandbox: [{ config: PodSandboxConfig; runtime_handler?: string }, { pod_sandbox_id: string }];
  StopPodSandbox: [{ pod_sandbox_id: string }, Record<string, never>];
  RemovePodSandbox: [{ pod_sandbox_id: string }, Record<string, never>];
  PodSandboxStatus: [
    { pod_sandbox_id: string; verbose?: boolean },
    { status: PodSandboxStatus; info: Record<string, string> },
  ];
  ListPodSandbox: [Record<string, never>, { items: { id: string; state: PodSandboxStatus['state'] }[] }];
  CreateContainer: [
    { pod_sandbox_id: string; config: ContainerConfig; sandbox_config: PodSandboxConfig },
    { container_id: string },
  ];
  StartContainer: [{ container_id: string }, Record<string, never>];
  StopContainer: [{ container_id: string; timeout?: number }, Record<string, never>];
  ContainerStatus: [
    { container_id: string },
    { status: { state: 'CONTAINER_CREATED' | 'CONTAINER_RUNNING' | 'CONTAINER_EXITED'; exit_code: number } },
  ];
  RemoveContainer: [{ container_id: string }, Record<string, never>];
  ExecSync: [
    { container_id: string; cmd: string[]; timeout?: number },
    { stdout: Buffer; stderr: Buffer; exit_code: number },
  ];
  ListImages: [Record<string, never>, { images: { id: string; repo_tags: string[] }[] }];
};

type UnaryClient = Client & {
  [method: string]: (
    request: object,
    options: { deadline: number },
    answered: (error: ServiceError | null, response: object) => void,
  ) => void;
};
type ClientConstructor = new (address: string, channel: ReturnType<typeof credentials.createInsecure>) => UnaryClient;

/** A connection to the CRI socket at `path`: one method per RPC, the runtime's own field names, errors with the RPC's name. */
export class CRI {
  readonly #runtime: UnaryClient;
  readonly #images: UnaryClient;

  constructor(path: string) {
    const definition = loadSync(runtimeV1Proto, { keepCase: true, longs: Number, enums: String, defaults: true });
    const services = loadPackageDefinition(definition) as unknown as {
      runtime: { v1: { RuntimeService: ClientConstructor; ImageService: ClientConstructor } };
    };
    const address = `unix://${path}`;
    this.#runtime = new services.runtime.v1.RuntimeService(address, credentials.createInsecure());
    this.#images = new services.runtime.v1.ImageService(address, credentials.createInsecure());
  }

  /**
   * Calls `method` and waits for its answer.
   * @param milliseconds until the call fails with DEADLINE_EXCEEDED
   */
  async call<M extends keyof Calls>(method: M, request: Calls[M][0], milliseconds = 20_000): Promise<Calls[M][1]> {
    const client = method === 'ListImages' ? this.#images : this.#runtime;
    return await new Promise((resolve, reject) => {
      client[method]?.(request, { deadline: Date.now() + milliseconds }, (error, response) => {
        if (error) reject(new Error(`${method}: ${error.message}`, { cause: error }));
        else resolve(response as Calls[M][1]);
      });
    });
  }

  close(): void {
    this.#runtime.close();
    this.#images.close();
  }
}
