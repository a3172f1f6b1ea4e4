/** The tests of what needs no browser. */
export default {
  rootDir: '.',
  testMatch: ['<rootDir>/test/**/*.spec.ts'],
  testEnvironment: 'node',
  transform: {
    '\\.tsx?$': [
      'ts-jest',
      {
        tsconfig: {
          esModuleInterop: true,
          isolatedModules: true,
          lib: ['DOM', 'ES2020'],
          module: 'commonjs',
          strict: true,
          target: 'ES2020',
          types: ['jest']
        }
      }
    ]
  }
};
