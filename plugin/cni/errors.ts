// SPDX-License-Identifier: Apache-2.0
// Every error code that leaves the plugin, and the one error type that carries it to stdout.

/**
 * Codes 1-7, 11, 50 and 51: CNI SPEC 1.1.0, section "Error". 8 is not in the SPEC, but is what the reference
 * library answers when a plugin is run inside the namespace it was asked to change. 100 and up are the plugin's own.
 */
export const registry = [
  {
    code: 1,
    name: 'INCOMPATIBLE_CNI_VERSION',
    meaning: 'The configuration asks for a CNI version, or for a verb in a version, that the plugin does not speak.',
  },
  { code: 2, name: 'UNSUPPORTED_FIELD', meaning: 'The conflist entry has a key that the plugin does not know.' },
  {
    code: 3,
    name: 'UNKNOWN_CONTAINER',
    meaning: 'The container does not exist. Never answered: a runtime may take it as leave to skip DEL.',
  },
  {
    code: 4,
    name: 'INVALID_ENVIRONMENT',
    meaning: 'A CNI_* variable is missing or invalid; the message names the variables.',
  },
  { code: 5, name: 'IO_FAILURE', meaning: 'Standard input could not be read.' },
  { code: 6, name: 'DECODING_FAILURE', meaning: 'Standard input is not a network configuration in JSON.' },
  {
    code: 7,
    name: 'INVALID_NETWORK_CONFIG',
    meaning: 'A value in the network configuration, in prevResult or in a pod annotation is invalid or missing.',
  },
  {
    code: 8,
    name: 'OWN_NETNS',
    meaning: "CNI_NETNS is the network namespace that the plugin runs in: a recycled process id, never a pod's.",
  },
  {
    code: 11,
    name: 'TRY_AGAIN_LATER',
    meaning: 'What the pod needs is not there yet, or the plugin was interrupted; nothing has to be repaired first.',
  },
  { code: 50, name: 'NOT_AVAILABLE', meaning: 'STATUS: no pod can be attached on this node now.' },
  {
    code: 51,
    name: 'NOT_AVAILABLE_LIMITED',
    meaning: 'STATUS: no pod can be attached, and the traffic of running pods is impaired.',
  },
  { code: 100, name: 'SANDBOX_NOT_FOUND', meaning: 'The network namespace or the interface in it does not exist.' },
  { code: 101, name: 'NO_HOST_PEER', meaning: "The pod's interface has no veth peer in the host's namespace." },
  { code: 102, name: 'ATTACH_FAILED', meaning: 'A program could not be attached to its hook.' },
  {
    code: 103,
    name: 'STATE_FAILED',
    meaning: 'The pinned state could not be created, read or written (no bpffs, a map is full).',
  },
  {
    code: 104,
    name: 'STATE_VERSION',
    meaning: 'The pinned state has the layout of another version, which this one cannot convert (see "Upgrading").',
  },
  { code: 105, name: 'PROGRAM_MISSING', meaning: 'CHECK: a program is detached, or another one is in its place.' },
  { code: 106, name: 'ENTRY_MISMATCH', meaning: "CHECK: a map entry of the pod is missing or differs from the pod's." },
  { code: 107, name: 'PROXY_NOT_READY', meaning: 'The proxy does not have the listener that is needed.' },
  { code: 108, name: 'AGENT_REFUSED', meaning: 'The node agent refused to enrol the pod.' },
  { code: 109, name: 'ADDON_FAILED', meaning: 'The native addon inside the executable could not be loaded.' },
  { code: 110, name: 'NOT_PERMITTED', meaning: 'The kernel refused for lack of a capability.' },
  { code: 111, name: 'INTERNAL', meaning: 'A defect of the plugin: an error that no other code describes.' },
] as const satisfies readonly { code: number; name: string; meaning: string }[];

export type ErrorCode = (typeof registry)[number]['code'];
type Entry = (typeof registry)[number];

/** Symbolic name -> code: `Code.ATTACH_FAILED` is 102. */
export const Code = Object.fromEntries(registry.map(({ name, code }) => [name, code])) as {
  readonly [E in Entry as E['name']]: E['code'];
};

/** An error as SPEC section "Error" has it. `message` is `msg: details`, for logs. */
export class CniError extends Error {
  override readonly name = 'CniError';
  readonly code: ErrorCode;
  /** one line, what failed */
  readonly msg: string;
  /** on which object and why; runtimes show it after msg, and it is all that an operator sees on failure */
  readonly details: string;

  constructor(code: ErrorCode, msg: string, details = '', options?: ErrorOptions) {
    super(details === '' ? msg : `${msg}: ${details}`, options);
    this.code = code;
    this.msg = msg;
    this.details = details;
  }
}

/** One line of JSON and a newline. */
export function errorDocument(error: CniError, cniVersion: string): string {
  return `${JSON.stringify({ cniVersion, code: error.code, msg: error.msg, details: error.details })}\n`;
}

/** A value for a message: JSON, cut at 200 characters. */
export function quote(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length <= 200 ? text : `${text.slice(0, 200)}... (${text.length} characters)`;
}
