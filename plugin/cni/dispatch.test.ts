// SPDX-License-Identifier: Apache-2.0
// The whole protocol without a kernel: dispatch() with verbs that record what reached them.

import { describe, expect, test } from 'vitest';
import { dispatch, type Outcome, type Request, type Verbs } from './dispatch.ts';
import { CniError, Code } from './errors.ts';
import type { Result } from './result.ts';
import { SUPPORTED_VERSIONS, type Verb } from './version.ts';

const ENV = { CNI_CONTAINERID: 'c1', CNI_NETNS: '/run/netns/pod', CNI_IFNAME: 'eth0', CNI_PATH: '/opt/cni/bin' };

interface Run extends Outcome {
  /** requests that reached a verb */
  requests: Request[];
  /** the error document, or {} */
  error: { cniVersion?: string; code?: number; msg?: string; details?: string };
  stdinReads: number;
}

async function run(env: NodeJS.ProcessEnv, stdin: unknown, verbs: Partial<Verbs> = {}): Promise<Run> {
  const requests: Request[] = [];
  let stdinReads = 0;
  const record = (request: Request) => {
    requests.push(request);
  };
  const outcome = await dispatch(
    env,
    () => {
      stdinReads++;
      return Buffer.isBuffer(stdin) ? stdin : Buffer.from(typeof stdin === 'string' ? stdin : JSON.stringify(stdin));
    },
    () => ({
      add: (request) => {
        record(request);
        return request.conf.prevResult as Result;
      },
      del: record,
      check: record,
      gc: record,
      status: record,
      ...verbs,
    }),
  );
  return { ...outcome, requests, stdinReads, error: outcome.exitCode === 1 ? JSON.parse(outcome.stdout) : {} };
}

const verb = (command: Verb | 'VERSION', env: NodeJS.ProcessEnv = {}) => ({ ...ENV, CNI_COMMAND: command, ...env });

/** What ptp really answers, in the shape of each family. */
function ptpResult(version: string): Record<string, unknown> {
  const old = ['0.3.1', '0.4.0'].includes(version);
  return {
    cniVersion: version,
    interfaces: [
      { name: 'veth952b442e', mac: '02:11:22:33:44:55' },
      {
        name: 'eth0',
        mac: '02:11:22:33:44:66',
        sandbox: '/run/netns/pod',
        ...(version === '1.1.0' && { mtu: 1400, socketPath: '/run/vhost.sock', pciID: '0000:00:1f.6' }),
      },
    ],
    ips: [
      { ...(old && { version: '4' }), interface: 1, address: '10.77.0.2/24', gateway: '10.77.0.1' },
      { ...(old && { version: '6' }), interface: 1, address: 'fd00:77::2/64', gateway: 'fd00:77::1' },
    ],
    routes: [
      { dst: '0.0.0.0/0', ...(version === '1.1.0' && { mtu: 1400, advmss: 1360, priority: 5, table: 100, scope: 0 }) },
      { dst: '::/0', gw: 'fd00:77::1' },
    ],
    dns: {},
  };
}

describe('environment', () => {
  test.each([
    ['nothing', {}, 'required env variables [CNI_COMMAND] missing', ''],
    ['empty command', { CNI_COMMAND: '' }, 'required env variables [CNI_COMMAND] missing', ''],
    ['unknown command', { CNI_COMMAND: 'FOO' }, 'unknown CNI_COMMAND: FOO', ''],
    ['lower case', { CNI_COMMAND: 'add' }, 'unknown CNI_COMMAND: add', ''],
    ['property of Object', { CNI_COMMAND: 'toString' }, 'unknown CNI_COMMAND: toString', ''],
    ['ADD', { CNI_COMMAND: 'ADD' }, 'required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME] missing', ''],
    ['CHECK', { CNI_COMMAND: 'CHECK' }, 'required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME] missing', ''],
    ['DEL', { CNI_COMMAND: 'DEL' }, 'required env variables [CNI_CONTAINERID,CNI_IFNAME] missing', ''],
    ['GC', { CNI_COMMAND: 'GC' }, 'required env variables [CNI_PATH] missing', ''],
    ['empty netns', verb('ADD', { CNI_NETNS: '' }), 'required env variables [CNI_NETNS] missing', ''],
    ['id with /', verb('ADD', { CNI_CONTAINERID: 'a/b' }), 'CNI_CONTAINERID: invalid characters in containerID', 'a/b'],
    ['id with -', verb('DEL', { CNI_CONTAINERID: '-a' }), 'CNI_CONTAINERID: invalid characters in containerID', '-a'],
    [
      'id with newline',
      verb('DEL', { CNI_CONTAINERID: 'a\n' }),
      'CNI_CONTAINERID: invalid characters in containerID',
      'a\n',
    ],
    [
      '16 bytes of name',
      verb('ADD', { CNI_IFNAME: 'abcdefghijklmnop' }),
      'CNI_IFNAME: interface name is too long',
      '"abcdefghijklmnop" has 16 bytes, the kernel takes 15',
    ],
    [
      '15 characters, 16 bytes',
      verb('ADD', { CNI_IFNAME: 'abcdefghijklmné' }),
      'CNI_IFNAME: interface name is too long',
      '"abcdefghijklmné" has 16 bytes, the kernel takes 15',
    ],
    ['.', verb('CHECK', { CNI_IFNAME: '.' }), 'CNI_IFNAME: interface name is . or ..', '.'],
    [
      'a:b',
      verb('DEL', { CNI_IFNAME: 'a:b' }),
      'CNI_IFNAME: interface name contains / or : or whitespace characters',
      '"a:b"',
    ],
    [
      'no-break space',
      verb('DEL', { CNI_IFNAME: 'a\u00a0b' }),
      'CNI_IFNAME: interface name contains / or : or whitespace characters',
      '"a\u00a0b"',
    ],
  ])('%s', async (_name, env: NodeJS.ProcessEnv, msg, details) => {
    const { error, requests, stdinReads, exitCode } = await run(env, '{}');
    expect({ error, exitCode, stdinReads, requests }).toEqual({
      error: { cniVersion: '1.1.0', code: 4, msg, details },
      exitCode: 1,
      stdinReads: 0,
      requests: [],
    });
  });

  test.each(['GC', 'STATUS'] as const)('%s neither needs nor validates id and interface', async (command) => {
    const env = { CNI_COMMAND: command, CNI_PATH: '/p', CNI_CONTAINERID: 'a/b', CNI_IFNAME: '::' };
    const { requests } = await run(env, { name: 'n', cniVersion: '1.1.0' });
    expect(requests).toMatchObject([{ command, containerId: '', ifname: '', netns: '' }]);
  });

  test('CNI_PATH is not needed but for GC', async () => {
    const stdin = { name: 'n', cniVersion: '1.1.0', prevResult: {} };
    for (const command of ['ADD', 'DEL', 'CHECK', 'STATUS'] as const) {
      expect((await run(verb(command, { CNI_PATH: undefined }), stdin)).exitCode).toBe(0);
    }
  });

  test('CNI_ARGS in any order, with pairs that are none', async () => {
    const args = 'K8S_POD_NAME=p;IgnoreUnknown=1;junk;=x;;K8S_POD_NAMESPACE=n;V=a=b;K8S_POD_NAME=q';
    const { requests } = await run(verb('DEL', { CNI_ARGS: args }), { name: 'n', cniVersion: '1.0.0' });
    expect(Object.fromEntries(requests[0]?.args ?? [])).toEqual({
      K8S_POD_NAME: 'q',
      IgnoreUnknown: '1',
      K8S_POD_NAMESPACE: 'n',
      V: 'a=b',
    });
  });

  test.each([
    ['1', true],
    ['true', true],
    ['TRUE', true],
    ['0', false],
    ['yes', false],
    [undefined, false],
  ])('CNI_NETNS_OVERRIDE=%s', async (value, expected) => {
    const { requests } = await run(verb('DEL', { CNI_NETNS_OVERRIDE: value }), { name: 'n', cniVersion: '1.0.0' });
    expect(requests[0]?.netnsOverride).toBe(expected);
  });
});

describe('stdin', () => {
  test.each([
    ['empty', '', 'stdin is empty'],
    ['truncated', '{"name": "n"', 'stdin (12 bytes) is not one JSON document'],
    ['trailing garbage', '{"name":"n"} x', 'stdin (14 bytes) is not one JSON document'],
    ['two documents', '{}{}', 'stdin (4 bytes) is not one JSON document'],
    ['byte order mark', '\ufeff{"name":"n"}', 'stdin (15 bytes) begins with a byte order mark'],
    ['list', '[]', 'stdin is a JSON list, not an object'],
    ['number', '5', 'stdin is a JSON number, not an object'],
    ['name: 5', '{"name":5}', 'name = 5: expected a string'],
    ['cniVersion: 1', '{"name":"n","cniVersion":1}', 'cniVersion = 1: expected a string'],
    ['runtimeConfig', '{"name":"n","cniVersion":"1.0.0","runtimeConfig":[]}', 'runtimeConfig = []: expected an object'],
    ['nesting', `{"name":"n","x":${'['.repeat(5000)}${']'.repeat(5000)}}`, 'stdin is nested deeper than 200 levels'],
  ])('%s', async (_name, stdin, details) => {
    const { error, requests } = await run(verb('ADD'), stdin);
    expect(error).toMatchObject({ code: 6, msg: 'cannot decode network configuration', details });
    expect(requests).toEqual([]);
  });

  test.each([
    ['null', 'null', 'missing network name', ''],
    ['no name', '{"cniVersion":"1.0.0"}', 'missing network name', ''],
    ['empty name', '{"name":"","cniVersion":"1.0.0"}', 'missing network name', ''],
    ['bad name', '{"name":"a b","cniVersion":"1.0.0"}', 'invalid characters found in network name', 'a b'],
    ['name in another case', '{"NAME":"n","cniVersion":"1.0.0"}', 'missing network name', ''],
    ['inherited name', '{"__proto__":{"name":"n"},"cniVersion":"1.0.0"}', 'missing network name', ''],
  ])('%s', async (_name, stdin, msg, details) => {
    for (const command of ['ADD', 'DEL', 'CHECK', 'GC', 'STATUS'] as const) {
      expect((await run(verb(command), stdin)).error).toMatchObject({ code: 7, msg, details });
    }
  });

  test('that cannot be read', async () => {
    const outcome = await dispatch(
      verb('ADD'),
      () => {
        throw new Error('EIO: i/o error, read');
      },
      () => expect.unreachable(),
    );
    expect(JSON.parse(outcome.stdout)).toEqual({
      cniVersion: '1.1.0',
      code: 5,
      msg: 'error reading from stdin',
      details: 'EIO: i/o error, read',
    });
  });
});

test('nothing in the configuration has a prototype', async () => {
  const text = '{"name":"n","cniVersion":"1.1.0","runtimeConfig":{"a":[{"b":{}}]},"__proto__":{"c":1}}';
  const { requests } = await run(verb('STATUS'), text);
  const visit = (value: unknown): unknown[] =>
    typeof value === 'object' && value !== null ? [value, ...Object.values(value).flatMap(visit)] : [];
  const prototypes = visit(requests[0]?.conf.raw).map((object) => Object.getPrototypeOf(object));
  expect(prototypes).toEqual([null, null, Array.prototype, null, null, null]);
});

describe('versions', () => {
  const supported = 'plugin supports ["0.3.1" "0.4.0" "1.0.0" "1.1.0"]';

  test.each([undefined, '', '0.1.0', '0.2.0', '0.3.0', '9.0.0', 'v1.1.0', '1.1', '1.1.0 ', '1.bad'])(
    'ADD with %j',
    async (cniVersion) => {
      const { error } = await run(verb('ADD'), { name: 'n', cniVersion, prevResult: {} });
      expect(error).toEqual({
        cniVersion: cniVersion || '1.1.0',
        code: 1,
        msg: 'incompatible CNI versions',
        details: `config is ${JSON.stringify(cniVersion || '0.1.0')}, ${supported}`,
      });
    },
  );

  test.each([
    ['CHECK', '0.3.1', 1, 'config version does not allow CHECK'],
    ['CHECK', '0.4.0', 0, ''],
    ['CHECK', '1.1.1', 1, 'plugin version does not allow CHECK'],
    ['CHECK', '1.bad', 6, 'invalid cniVersion'],
    ['CHECK', '0.5.0', 1, 'incompatible CNI versions'],
    ['CHECK', '1.1', 1, 'incompatible CNI versions'],
    ['GC', '1.0.0', 1, 'config version does not allow GC'],
    ['GC', '1.1.0', 0, ''],
    ['GC', '2.0.0', 1, 'plugin version does not allow GC'],
    ['STATUS', '0.3.1', 1, 'config version does not allow STATUS'],
    ['STATUS', '1.0.0', 1, 'config version does not allow STATUS'],
    ['STATUS', '1.1.0', 0, ''],
    ['STATUS', '', 1, 'config version does not allow STATUS'],
    ['DEL', '0.3.1', 0, ''],
    ['DEL', '9.0.0', 1, 'incompatible CNI versions'],
  ] as const)('%s with %j', async (command, cniVersion, code, msg) => {
    const { error, requests } = await run(verb(command), { name: 'n', cniVersion, prevResult: {} });
    expect([error.code ?? 0, error.msg ?? '', requests.length]).toEqual([code, msg, code === 0 ? 1 : 0]);
  });
});

describe.each(SUPPORTED_VERSIONS)('[%s]', (cniVersion) => {
  const conf = (more: object = {}) => ({ cniVersion, name: 'pods', type: 'ambient-redirect', ...more });

  test('ADD passes prevResult through unchanged, cniVersion first', async () => {
    const { cniVersion: _, ...rest } = ptpResult(cniVersion);
    const prevResult = { ...rest, cniVersion };
    const { stdout, stderr, exitCode } = await run(verb('ADD'), conf({ prevResult }));
    expect([exitCode, stderr]).toEqual([0, '']);
    expect(JSON.parse(stdout)).toEqual(prevResult);
    expect(stdout).toMatch(/^\{"cniVersion":"[0-9.]+",.*\}\n$/);
  });

  test('ADD keeps keys that nobody knows', async () => {
    const text = `{"cniVersion":"${cniVersion}","name":"n","prevResult":{"x":{"__proto__":{"y":[null]}},"__proto__":1}}`;
    const { stdout } = await run(verb('ADD'), text);
    expect(stdout).toBe(`{"cniVersion":"${cniVersion}","x":{"__proto__":{"y":[null]}},"__proto__":1}\n`);
  });

  test('ADD labels a prevResult without version', async () => {
    const { stdout } = await run(verb('ADD'), conf({ prevResult: { ips: [{ address: '10.0.0.1/8' }] } }));
    expect(stdout).toBe(`{"cniVersion":"${cniVersion}","ips":[{"address":"10.0.0.1/8"}]}\n`);
  });

  test.each(['0.1.0', '0.2.0', '0.3.0', '0.3.1', '0.4.0', '1.0.0', '1.1.0', '2.0.0', 'x'])(
    'ADD with a prevResult of %s',
    async (other) => {
      const { stdout, error } = await run(verb('ADD'), conf({ prevResult: { cniVersion: other } }));
      const families = [
        ['0.3.0', '0.3.1', '0.4.0'],
        ['1.0.0', '1.1.0'],
      ];
      if (families.some((family) => family.includes(other) && family.includes(cniVersion))) {
        expect(stdout).toBe(`{"cniVersion":"${cniVersion}"}\n`);
      } else {
        expect(error).toEqual({
          cniVersion,
          code: 7,
          msg: 'prevResult is of an incompatible version',
          details: `prevResult has cniVersion "${other}", the configuration "${cniVersion}"`,
        });
      }
    },
  );

  test.each([
    ['no prevResult', {}],
    ['null', { prevResult: null }],
  ])('ADD and CHECK with %s', async (_name, more) => {
    for (const command of cniVersion === '0.3.1' ? (['ADD'] as const) : (['ADD', 'CHECK'] as const)) {
      expect((await run(verb(command), conf(more))).error).toEqual({
        cniVersion,
        code: 7,
        msg: 'must be called as a chained plugin',
        details: `prevResult is missing; ${command} needs the Result of the plugin that made the interface`,
      });
    }
  });

  test.each([
    ['a list', []],
    ['a number', 5],
    ['a bad address', { ips: [{ address: 'x' }] }],
    ['another family', { cniVersion: '0.1.0' }],
  ])('DEL lets pass a prevResult that is %s', async (_name, prevResult) => {
    const { requests, exitCode, stdout } = await run(verb('DEL', { CNI_NETNS: undefined }), conf({ prevResult }));
    expect([exitCode, stdout, requests[0]?.netns]).toEqual([0, '', '']);
    expect(requests[0]?.conf.prevResult).toBeUndefined();
    expect(requests[0]?.conf.prevResultError).toBeInstanceOf(CniError);
  });

  test('DEL hands on a good prevResult, and does without', async () => {
    const good = await run(verb('DEL'), conf({ prevResult: ptpResult(cniVersion) }));
    expect(good.requests[0]?.conf.prevResult).toEqual(ptpResult(cniVersion));
    const without = await run(verb('DEL'), conf({ runtimeConfig: 'nonsense' }));
    expect(without.requests[0]?.conf).toMatchObject({ runtimeConfig: {} });
    expect(without.requests[0]?.conf.prevResultError).toBeUndefined();
  });

  test('success of DEL and CHECK says nothing', async () => {
    for (const command of cniVersion === '0.3.1' ? (['DEL'] as const) : (['DEL', 'CHECK'] as const)) {
      const { stdout, stderr, exitCode } = await run(verb(command), conf({ prevResult: ptpResult(cniVersion) }));
      expect([stdout, stderr, exitCode]).toEqual(['', '', 0]);
    }
  });

  test('VERSION answers in the version it was asked in', async () => {
    const { stdout, exitCode } = await run({ CNI_COMMAND: 'VERSION' }, { cniVersion });
    expect([exitCode, stdout]).toEqual([
      0,
      `{"cniVersion":"${cniVersion}","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}\n`,
    ]);
  });
});

describe('prevResult', () => {
  const add = async (prevResult: unknown) =>
    (await run(verb('ADD'), { name: 'n', cniVersion: '1.1.0', prevResult })).error;

  test.each([
    [[], 'prevResult = []: expected an object'],
    ['x', 'prevResult = "x": expected an object'],
    [{ cniVersion: 1 }, 'prevResult.cniVersion = 1: expected a string'],
    [{ interfaces: {} }, 'prevResult.interfaces = {}: expected a list'],
    [{ interfaces: [null] }, 'prevResult.interfaces[0] = null: expected an object'],
    [{ interfaces: [{ name: 5 }] }, 'prevResult.interfaces[0].name = 5: expected a string'],
    [{ interfaces: [{ mac: 5 }] }, 'prevResult.interfaces[0].mac = 5: expected a string'],
    [{ interfaces: [{}, { sandbox: {} }] }, 'prevResult.interfaces[1].sandbox = {}: expected a string'],
    [{ interfaces: [{ mtu: '1500' }] }, 'prevResult.interfaces[0].mtu = "1500": expected an integer'],
    [{ ips: 'x' }, 'prevResult.ips = "x": expected a list'],
    [{ ips: [{ address: 5 }] }, 'prevResult.ips[0].address = 5: expected a string'],
    [{ ips: [{ address: '10.0.0.1/8', interface: '0' }] }, 'prevResult.ips[0].interface = "0": expected an integer'],
    [{ ips: [{ address: '10.0.0.1/8', interface: 0.5 }] }, 'prevResult.ips[0].interface = 0.5: expected an integer'],
    [{ ips: [{ address: '10.0.0.1/8', version: 4 }] }, 'prevResult.ips[0].version = 4: expected a string'],
    [{ routes: [{ dst: '::/0', mtu: true }] }, 'prevResult.routes[0].mtu = true: expected an integer'],
    [{ dns: [] }, 'prevResult.dns = []: expected an object'],
    [{ dns: { nameservers: '1.1.1.1' } }, 'prevResult.dns.nameservers = "1.1.1.1": expected a list'],
    [{ dns: { search: ['a', 1] } }, 'prevResult.dns.search[1] = 1: expected a string'],
  ])('%j has the wrong shape', async (prevResult, details) => {
    expect(await add(prevResult)).toMatchObject({ code: 6, details });
  });

  test.each([
    [{ ips: [{}] }, 'prevResult.ips[0].address = undefined: expected an IP address with prefix length'],
    [{ ips: [{ address: '' }] }, 'prevResult.ips[0].address = "": expected an IP address with prefix length'],
    [
      { ips: [{ address: '10.0.0.1' }] },
      'prevResult.ips[0].address = "10.0.0.1": expected an IP address with prefix length',
    ],
    [
      { ips: [{ address: '10.0.0.1/33' }] },
      'prevResult.ips[0].address = "10.0.0.1/33": expected an IP address with prefix length',
    ],
    [{ ips: [{ address: '10.0.0.1/8', gateway: 'x' }] }, 'prevResult.ips[0].gateway = "x": expected an IP address'],
    [
      { routes: [{ dst: 'default' }] },
      'prevResult.routes[0].dst = "default": expected an IP address with prefix length',
    ],
    [{ routes: [{ dst: '::/0', gw: '1.2.3' }] }, 'prevResult.routes[0].gw = "1.2.3": expected an IP address'],
  ])('%j has an impossible value', async (prevResult, details) => {
    expect(await add(prevResult)).toMatchObject({ code: 7, details });
  });

  test.each([
    [{}],
    [{ interfaces: null, ips: null, routes: null, dns: null }],
    // Amazon's VPC CNI keeps a VLAN number and a device number in an interface that does not exist.
    [{ interfaces: [{ name: 'dummy3aef', mac: '0', sandbox: '0', socketPath: '1' }] }],
    [
      {
        ips: [
          { address: '10.0.0.1/8', interface: -1, gateway: '' },
          { address: '::1/128', interface: 99 },
        ],
      },
    ],
    [{ ips: [{ address: '10.0.0.1/8', interface: null }] }],
  ])('%j is accepted', async (prevResult) => {
    expect(await add(prevResult)).toEqual({});
  });
});

describe('GC', () => {
  const gc = (more: object) => run(verb('GC'), { name: 'n', cniVersion: '1.1.0', ...more });
  const one = [{ containerID: 'c', ifname: 'eth0' }];
  const other = [{ containerID: 'd', ifname: 'eth0', more: 1 }];

  test.each([
    ['absent', {}, null],
    ['null', { 'cni.dev/valid-attachments': null, 'cni.dev/attachments': null }, []],
    ['empty', { 'cni.dev/valid-attachments': [] }, []],
    ['list', { 'cni.dev/valid-attachments': one, 'cni.dev/attachments': one }, one],
    ['old key', { 'cni.dev/attachments': one }, one],
    [
      'new before old',
      { 'cni.dev/valid-attachments': other, 'cni.dev/attachments': one },
      [{ containerID: 'd', ifname: 'eth0' }],
    ],
    ['new null before old', { 'cni.dev/valid-attachments': null, 'cni.dev/attachments': one }, []],
  ])('attachments %s', async (_name, more, expected) => {
    const { requests, stdout } = await gc(more);
    expect(requests.map((request) => request.conf.validAttachments)).toEqual([expected]);
    expect(stdout).toBe('');
  });

  test.each([
    [{}, 'cni.dev/valid-attachments = {}: expected a list'],
    [[...one, 'c'], 'cni.dev/valid-attachments[1] = "c": expected an object'],
    [[{ ifname: 'eth0' }], 'cni.dev/valid-attachments[0].containerID = undefined: expected a container id'],
    [
      [{ containerID: 'a/b', ifname: 'eth0' }],
      'cni.dev/valid-attachments[0].containerID = "a/b": expected a container id',
    ],
    [[{ containerID: 'c', ifname: '' }], 'cni.dev/valid-attachments[0].ifname = "": expected an interface name'],
  ])('%j is refused', async (value, details) => {
    const { requests, error } = await gc({ 'cni.dev/valid-attachments': value });
    expect([requests, error]).toMatchObject([[], { code: 7, details }]);
  });

  test('and STATUS do not look at prevResult', async () => {
    for (const command of ['GC', 'STATUS'] as const) {
      const { requests } = await run(verb(command), { name: 'n', cniVersion: '1.1.0', prevResult: 5 });
      expect(requests[0]?.conf.prevResult).toBeUndefined();
    }
  });

  test('other verbs are not told of attachments', async () => {
    const { requests } = await run(verb('DEL'), { name: 'n', cniVersion: '1.1.0', 'cni.dev/valid-attachments': 5 });
    expect(requests[0]?.conf.validAttachments).toBeNull();
  });
});

describe('VERSION', () => {
  const newest = '{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}\n';

  test.each([
    '',
    'x',
    'null',
    '5',
    '{}',
    '{"cniVersion":5}',
    '{"cniVersion":"9.0.0"}',
    '{"__proto__":{"cniVersion":"0.4.0"}}',
  ])('with stdin %j answers in the newest', async (stdin) => {
    const env = { CNI_COMMAND: 'VERSION', CNI_NETNS: 'dummy', CNI_IFNAME: 'dummy', CNI_PATH: 'dummy' };
    expect(await run(env, stdin)).toMatchObject({ exitCode: 0, stdout: newest, requests: [] });
  });

  test('needs no stdin', async () => {
    const closed = () => {
      throw new Error('EBADF');
    };
    expect(await dispatch({ CNI_COMMAND: 'VERSION' }, closed, () => expect.unreachable())).toEqual({
      stdout: newest,
      stderr: '',
      exitCode: 0,
    });
  });
});

describe('a verb that fails', () => {
  const conf = { name: 'n', cniVersion: '1.0.0', prevResult: {} };

  test('with a CniError', async () => {
    const { stdout, stderr, exitCode } = await run(verb('ADD'), conf, {
      add: () => {
        throw new CniError(Code.ATTACH_FAILED, 'attach pod_egress to veth12', 'EEXIST');
      },
    });
    expect({ stdout, stderr, exitCode }).toEqual({
      stdout: '{"cniVersion":"1.0.0","code":102,"msg":"attach pod_egress to veth12","details":"EEXIST"}\n',
      stderr: 'ambient-redirect: ADD failed with code 102: attach pod_egress to veth12: EEXIST\n',
      exitCode: 1,
    });
  });

  test.each([
    ['an Error', new Error('boom'), 'boom'],
    ['a string', 'boom', 'boom'],
    ['undefined', undefined, 'undefined'],
    ['an object without prototype', Object.create(null), 'object'],
  ])('with %s', async (_name, thrown, details) => {
    for (const fail of [() => Promise.reject(thrown), () => Promise.resolve().then(() => Promise.reject(thrown))]) {
      const { error, exitCode } = await run(verb('DEL'), conf, { del: fail });
      expect([exitCode, error]).toEqual([1, { cniVersion: '1.0.0', code: 111, msg: 'internal error', details }]);
    }
  });

  test.each([
    ['ADD', 109],
    ['DEL', 109],
    ['STATUS', 50],
  ] as const)('because the addon does not load: %s', async (command, code) => {
    const outcome = await dispatch(
      verb(command),
      () => Buffer.from(JSON.stringify({ ...conf, cniVersion: '1.1.0' })),
      () => {
        throw new Error('/tmp: noexec');
      },
    );
    expect(JSON.parse(outcome.stdout)).toEqual({
      cniVersion: '1.1.0',
      code,
      msg: 'cannot load the native addon',
      details: '/tmp: noexec',
    });
  });
});
